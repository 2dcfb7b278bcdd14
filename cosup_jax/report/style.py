"""The look of report.html, light and dark."""

CSS = """
:root {
  color-scheme: light dark;
  --paper: #fdfdfc; --card: #ffffff; --ink: #1d2126; --soft: #636b75; --rule: #e3e5e8;
  --mark: #fff0b8; --right: #17784a; --wrong: #b3372f; --gold: #8a6a00;
  --series-1: #7c8794; --series-2: #2563b0; --series-3: #c2571a; --series-4: #16805a;
  --series-5: #8e4aa8; --series-6: #a8842c; --series-7: #b03a5b;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171a; --card: #1b1f23; --ink: #e4e7ea; --soft: #98a2ad; --rule: #2d3339;
    --mark: #574a12; --right: #58c690; --wrong: #f08a80; --gold: #e0bf55;
    --series-1: #93a0ad; --series-2: #74aef2; --series-3: #f09a5e; --series-4: #5cc79a;
    --series-5: #cb95e3; --series-6: #d9b866; --series-7: #ee88a6;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 66rem; padding: 2.5rem 1.25rem 4rem; color: var(--ink);
  background: var(--paper); font: 1rem/1.55 system-ui, sans-serif; overflow-wrap: anywhere;
}
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 1.25rem; font-weight: 650; }
h2 { font-size: 1.15rem; margin: 3rem 0 1rem; font-weight: 650; }
h3 { font-size: 1.05rem; margin: .35rem 0; font-weight: 600; }
p { margin: .35rem 0; }
.kicker, .meta, .unit, .score, .gold > span, dt, figure ul { color: var(--soft); }
.kicker { margin: 0; font-size: .9rem; }
dl { display: flex; flex-wrap: wrap; gap: .6rem 2rem; margin: 0; }
dt { font-size: .8rem; }
dd { margin: 0; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; overflow-wrap: normal; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; text-align: right; font-weight: 400; white-space: nowrap; }
th:first-child { text-align: left; padding-left: 0; }
thead th { color: var(--soft); font-size: .85rem; }
th.set { font-weight: 650; padding-top: .9rem; border-bottom: 1px solid var(--rule); }
td.best { font-weight: 650; }
@media (max-width: 40rem) {
  table { font-size: .88rem; }
  th, td { padding: .3rem 0 .3rem .5rem; }
  thead th, tbody th { white-space: normal; }
}
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr));
  gap: 2rem 2.5rem; }
figure { margin: 0; }
figure > svg { width: 100%; height: auto; display: block; }
nav { margin-top: 1.2rem; display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; }
a { color: var(--series-2); text-decoration: none; }
a:hover { text-decoration: underline; }
h4 { font-size: 1.05rem; margin: .35rem 0; font-weight: 600; }
section > h3 { margin: 2.2rem 0 .3rem; }
section .wide + .charts { margin-top: 1.4rem; }
.note { color: var(--soft); font-size: .9rem; }
table.scores { font-size: .9rem; }
table.scores small { color: var(--soft); font-size: .8em; }
table.scores td { border-top: 1px solid var(--rule); }
th.left, td.left { text-align: left; }
td.left:first-child, th.left:first-child { padding-left: 0; }
details { margin: .8rem 0; }
summary { cursor: pointer; color: var(--soft); font-size: .9rem; }
article ul { list-style: none; padding: 0; font-size: .92rem; }
article ul li { border: 0; padding: .15rem 0; }
svg text { font-family: system-ui, sans-serif; }
figcaption { font-weight: 600; margin-bottom: .3rem; }
.unit { font-weight: 400; font-size: .85rem; margin-left: .3rem; }
figure ul { list-style: none; display: flex; flex-wrap: wrap; gap: .1rem 1rem; margin: .2rem 0 0;
  padding: 0; font-size: .82rem; }
.key { width: 20px; height: 6px; margin-right: .35rem; vertical-align: middle; fill: none;
  stroke-width: 2; }
article { background: var(--card); border: 1px solid var(--rule); border-radius: .6rem;
  padding: 1rem 1.2rem; margin-bottom: 1rem; }
.meta, .gold, .score { font-size: .85rem; }
.answer { font-size: 1.05rem; }
.cite { color: var(--series-2); font-weight: 600; }
sup.cite { font-size: .75em; line-height: 0; }
article ol { list-style: none; padding: 0; margin: .8rem 0 0; font-size: .92rem; }
article li { border-top: 1px solid var(--rule); padding: .5rem 0 .2rem; }
mark { background: var(--mark); color: inherit; border-radius: .2rem; padding: 0 .15em; }
.badge { font-size: .75rem; font-weight: 600; padding: .05rem .5rem; border-radius: 1rem;
  border: 1px solid; }
.badge.right { color: var(--right); } .badge.wrong { color: var(--wrong); }
.badge.gold { color: var(--gold); }
"""

PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""
