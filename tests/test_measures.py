"""What a study measures on a run, each against a plain computation of the same."""

import collections
import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from declared import held_to_its_word, no_empty_words
from flax.traverse_util import flatten_dict
from towns import write_data
from untrained import config_of, save_checkpoint, write_config

from cosup_jax import cosup, sharding
from cosup_jax.data import markup, pipeline
from cosup_jax.data.plan import Plan
from cosup_jax.data.schema import Example, Passage
from cosup_jax.studies import measures
from cosup_jax.studies import run as run_lib
from cosup_jax.studies import spaces as spaces_lib
from cosup_jax.studies.evidence import closed_book, conflict, conflicts, evidence, relation
from cosup_jax.studies.geometry import PAIRS, drift, geometry, rotation, spread, unit
from cosup_jax.studies.gradients import gradients
from cosup_jax.studies.plane import plane, projected
from cosup_jax.studies.spaces import (
    mutual_nearest,
    nearest_passages,
    neighbours,
    overlap,
    spaces,
    spaces_over_training,
)

SET = "towns.dev"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Step 2 of a workdir whose step 1 has other random weights."""
    home = tmp_path_factory.mktemp("measures")
    data = write_data(home)
    data.write_text("\n".join(data.read_text().splitlines()[::-1]))  # in no order of passages
    write_config(
        home,
        **{"data__train": str(data), "data__eval": str(data), "data__vocab_size": 400},
        **{"gen__arch__layers": 2, "gen__arch__tie_embeddings": False, "eval__examples": 12},
        **{"data__max_gen_tokens": 192, "data__max_ctx_tokens": 80, "data__ctx_row_tokens": 160},
        **{"loss__ntp_weight": 3.0, "loss__nsp_weight": 0.0},
    )
    save_checkpoint(home, seed=0, step=1, keep=2)
    save_checkpoint(home, seed=1, step=2, keep=2)
    return run_lib.opened(config_of(home), home / "run")


def hidden(run, tower, tokens):
    """[n, D] states of one text alone, in float64."""
    row = jnp.asarray(tokens)[None]
    place = jnp.arange(row.shape[1])[None]
    states = _hidden(getattr(run.trained.towers, tower), run.trained.params[tower], row, place)
    return np.asarray(states[0], np.float64)


@jax.jit(static_argnums=0)
def _hidden(tower, params, row, place):
    return tower.hidden(params, row, jnp.ones_like(row), place)


def training_text(run, example, passages):
    tokenizer, most = run.trained.tokenizers.gen, run.trained.config.data.max_ctx_tokens
    return markup.encode([markup.pieces(example, passages)], tokenizer, most)[0]


def state_at_ret(run, example):
    marked = training_text(run, example, run.sets[0].dataset.passages)
    return hidden(run, "gen", marked.tokens)[marked.ret_positions[0]]


def vector(run, passage):
    trained = run.trained
    most = trained.config.data.max_ctx_tokens
    ((tokens, _),) = markup.ctx_tokens(
        [passage], trained.tokenizers.ctx, trained.config.ctx.pooling, most
    )
    return hidden(run, "ctx", tokens)[-1]


def cosine(a, b):
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def test_spread_equals_loops():
    """Bugs: a pair counted twice or with itself, a distance for its square, the singular values'
    squares for themselves."""
    x = unit(np.random.default_rng(0).normal(size=(7, 3)) + 0.5)
    pairs = [(x[i], x[j]) for i in range(7) for j in range(i)]
    found = spread(x)
    kernel = [np.exp(-2 * np.sum((a - b) ** 2)) for a, b in pairs]
    assert found["uniformity"] == pytest.approx(np.log(np.mean(kernel)))
    assert found["anisotropy"] == pytest.approx(np.mean([a @ b for a, b in pairs]))
    for name, y in (("effective_rank", x), ("effective_rank_centred", x - x.mean(0))):
        singular = np.sqrt(np.linalg.eigvalsh(y.T @ y))
        p = singular / singular.sum()
        assert found[name] == pytest.approx(np.exp(-(p * np.log(p)).sum()))
    one_point = spread(np.ones((4, 1)))
    assert (one_point["uniformity"], one_point["anisotropy"]) == (0, 1)
    assert spread(np.eye(5))["effective_rank"] == pytest.approx(5)


def test_a_rotation_is_no_drift():
    """Bugs: the transpose of the rotation; a scale or a shift that is fitted too; a step compared
    with itself, or with one before it."""
    rng = np.random.default_rng(0)
    x, noise = rng.normal(size=(2, 60, 5))
    turn = np.linalg.qr(rng.normal(size=(5, 5)))[0]
    past = {4: unit(x), 8: unit(x @ turn), 9: unit(x @ turn + 0.3 * noise)}
    found = drift(past, [f"p{i}" for i in range(60)])
    mean = {name: np.mean(list(values.values())) for name, values in found.items()}
    kinds = [f"to_{to}{how}" for to in ("next", "last") for how in ("", "_rotated", "_shuffled")]
    assert mean.keys() == {f"drift/{kind}/step_{step}" for kind in kinds for step in (4, 8)}
    assert mean["drift/to_next_rotated/step_4"] == pytest.approx(1)
    assert mean["drift/to_next/step_4"] < 0.7 and mean["drift/to_next_shuffled/step_4"] < 0.5
    best = scipy.linalg.orthogonal_procrustes(past[4], past[9])[0]
    np.testing.assert_allclose(rotation(past[4], past[9]), best, atol=1e-12)
    assert found["drift/to_last_rotated/step_4"]["p7"] == pytest.approx(
        past[4][7] @ best @ past[9][7]
    )
    assert found["drift/to_last/step_8"]["p7"] == pytest.approx(past[8][7] @ past[9][7])


def test_neighbours_equal_loops(monkeypatch):
    """Bugs: a vector among its own neighbours; an overlap that counts places; a passage whose
    nearest query is another one; vocabulary counted as passages."""
    monkeypatch.setattr("cosup_jax.studies.spaces.NEIGHBOURS", 4)
    rng = np.random.default_rng(0)
    x, y = (unit(rng.normal(size=(20, 3))) for _ in range(2))
    near = [
        [
            sorted((j for j in range(20) if j != i), key=lambda j, i=i, z=z: -(z[i] @ z[j]))[:4]
            for i in range(20)
        ]
        for z in (x, y)
    ]
    np.testing.assert_array_equal(neighbours(x), near[0])
    shared = [len(set(a) & set(b)) / 4 for a, b in zip(*near, strict=True)]
    np.testing.assert_allclose(overlap(neighbours(x), neighbours(y)), shared)
    queries, gold = unit(x[:12] + 0.5 * y[:12]), np.array([*range(8), 3, 3, 15, 16])
    queries[3], queries[8] = unit(x[3:4] + 0.01 * y[3:4])[0], x[3]  # both nearest to passage 3
    expected = [
        np.argmax(x @ q) == g and np.argmax(queries @ x[g]) == i
        for i, (q, g) in enumerate(zip(queries, gold, strict=True))
    ]
    found = mutual_nearest(queries, x, gold)
    assert found.tolist() == expected and found[8] and not found[3] and 2 < sum(found) < 10
    is_passage = nearest_passages(queries, x[:9], y)
    for q, row in zip(queries, is_passage, strict=True):
        order = np.argsort(-np.concatenate([x[:9] @ q, y @ q]))[:4]
        assert row.tolist() == (order < 9).tolist()


@pytest.mark.parametrize("count", [4, 40])
def test_a_shuffled_title_is_never_the_item_s_own(count):
    """Bugs: a baseline that holds the item itself, where there are fewer than it is a mean over;
    one of those without a title; one of a single other."""
    titles = [{100 + i, 0} if i % 4 else set() for i in range(count)]  # 0 is in every title
    likely = np.array([[100 + i, 0, 1 + i % 2] for i in range(count)])
    found = spaces_lib._titles("t", [f"p{i}" for i in range(count)], likely, titles)
    named = {f"p{i}" for i in range(count) if i % 4}
    assert found["t"] == dict.fromkeys(named, 1.0)
    assert found["t_shuffled"] == dict.fromkeys(named, 0.5)
    likely[:, 1] = 100 + (np.arange(count) + 1) % count  # one other's title
    some = spaces_lib._titles("t", [f"p{i}" for i in range(count)], likely, titles)["t_shuffled"]
    assert count < 10 or set(some.values()) - {0.0, 0.5}


def principal(x):
    """Places on the two first principal components and their share, from the covariance."""
    x = x - sum(x) / len(x)
    variances, axes = np.linalg.eigh(sum(np.outer(row, row) for row in x))
    axes = [axes[:, -1], axes[:, -2]]
    axes = [axis if max(axis, key=abs) > 0 else -axis for axis in axes]
    return [[row @ axis for axis in axes] for row in x], sum(variances[-2:]) / sum(variances)


def test_the_plane_is_that_of_the_principal_components():
    """Bugs: places about 0 and not about the mean; whitened, or of other components; a share of
    singular values; a sign that another machine, or the order of the vectors, turns over."""
    x = np.random.default_rng(0).normal(size=(40, 6)) * [1, 5, 2, 3, 1, 1] + 4
    places, share = projected(x)
    expected, held = principal(x)
    np.testing.assert_allclose(places, expected, atol=1e-9)
    assert share == pytest.approx(held) and 0.5 < share < 0.95
    np.testing.assert_allclose(projected(x[::-1])[0][::-1], places, atol=1e-9)
    same, share = projected(np.ones((5, 3)))
    assert share == 0 and not same.any()


def test_what_is_drawn_on_the_plane_keeps_its_place(monkeypatch):
    """Bugs: a query at a passage's place; a set's questions in another set; vectors that are not of
    length 1; a question's second [Ret] over its first, or the mean of both; more than are drawn, or
    other ones in another run; each kind about its own mean."""
    rng, kept = np.random.default_rng(0), {}
    monkeypatch.setattr("cosup_jax.studies.plane.MOST", 9)
    cloud = lambda count, at: (rng.normal(size=(count, 4)) + at) * rng.uniform(1, 9, (count, 1))
    passages, columns = cloud(9, [6, 0, 0, 0]), cloud(20, [0, 6, 0, 0])
    queries = {"a": cloud(12, [0, 0, 6, 0]), "b": cloud(3, [0, 0, 0, 6]), "none": cloud(0, 0)}
    names = {"a": [f"q{i // 2}" for i in range(12)], "b": ["q0", "q1", "q2"], "none": []}
    vocabulary = spaces_lib.Vocabulary(np.arange(20) + 100, columns, columns)
    sample = run_lib.Sample([f"s/p{i}" for i in range(9)], [], [])
    asked = lambda run, part: run_lib.Asked(names[part.name], queries[part.name], None)
    monkeypatch.setattr(run_lib, "sample", lambda run, most: kept.update(most=most) or sample)
    monkeypatch.setattr(run_lib, "vectors", lambda run, tokens: passages)
    monkeypatch.setattr(run_lib, "asked", asked)
    monkeypatch.setattr(spaces_lib, "vocabulary_of", lambda run: vocabulary)
    run = SimpleNamespace(sets=[SimpleNamespace(name=name) for name in names])
    found = plane(run)
    held_to_its_word("plane", found)
    no_empty_words("plane", found)
    assert plane(run) == found and kept["most"] == 9 and found.keys() == {"", "a", "b"}
    tokens = list(found[""]["plane/vocabulary/x"])
    assert len(set(tokens)) == 9 and set(tokens) <= {str(i) for i in range(100, 120)}
    assert list(found["a"]["plane/queries/x"]) == [f"q{i}" for i in range(6)]
    drawn = [("", "plane/passages/{}", f"s/p{i}", passages[i]) for i in range(9)]
    drawn += [("", "plane/vocabulary/{}", id, columns[int(id) - 100]) for id in tokens]
    drawn += [("a", "plane/queries/{}", f"q{i}", queries["a"][2 * i]) for i in range(6)]
    drawn += [("b", "plane/queries/{}", f"q{i}", queries["b"][i]) for i in range(3)]
    expected, share = principal(np.stack([v / np.linalg.norm(v) for *_, v in drawn]))
    for (held_out, name, id, _), place in zip(drawn, expected, strict=True):
        own = [found[held_out][name.format(axis)][id] for axis in "xy"]
        assert own == pytest.approx(place), (held_out, name, id)
    assert found[""]["plane/share"] == {"": pytest.approx(share)}


@pytest.mark.slow
def test_plane_of_a_run(run):
    """Bugs: a vector of the wrong tower or of another passage; a state that is not at [Ret]; the
    embedding for the unembedding."""
    (part,), found = run.sets, plane(run)
    held_to_its_word("plane", found)
    no_empty_words("plane", found)
    out = np.asarray(run.trained.params["gen"]["head"]["kernel"], np.float64).T
    drawn = {"passages": {f"towns/{p.id}": vector(run, p) for p in part.dataset.passages.values()}}
    drawn["vocabulary"] = {token: out[int(token)] for token in found[""]["plane/vocabulary/x"]}
    drawn["queries"] = {example.id: state_at_ret(run, example) for example in part.examples}
    places, share = principal(unit(np.stack([v for own in drawn.values() for v in own.values()])))
    given = [(kind, id) for kind, own in drawn.items() for id in own]
    for (kind, id), place in zip(given, places, strict=True):
        own = found[SET if kind == "queries" else ""]
        at = [own[f"plane/{kind}/{axis}"][id] for axis in "xy"]
        assert at == pytest.approx(place, abs=1e-3), (kind, id)
    assert found[""]["plane/share"][""] == pytest.approx(share, abs=1e-4)
    assert [len(own) for own in drawn.values()] == [40, 300, 12]


@pytest.mark.slow
def test_geometry_of_a_run(run):
    """Bugs: a query with another question's passage; a checkpoint read as the newest; passages
    that differ from run to run; what is compared is not of length 1."""
    (part,), found = run.sets, geometry(run)
    held_to_its_word("geometry", found)
    no_empty_words("geometry", found)
    example = part.examples[5]
    passage = part.dataset.passages[example.evidence[0]]
    at_ret = state_at_ret(run, example)
    assert found[SET]["alignment"].keys() == {one.id for one in part.examples}
    assert found[SET]["alignment"][example.id] == pytest.approx(
        2 - 2 * cosine(at_ret, vector(run, passage)), rel=1e-4
    )
    past = list(run_lib.over_training(run))
    assert [at.trained.step for at in past] == [1, 2] and past[1] is run
    before, after = (vector(at, passage) for at in past)
    assert abs(cosine(before, after)) < 0.8
    moved = found[""]["drift/to_last/step_1"]
    assert len(moved) == 40 and moved == found[""]["drift/to_next/step_1"]
    assert moved[f"towns/{passage.id}"] == pytest.approx(cosine(before, after), abs=1e-4)
    every = unit(np.stack([vector(run, one) for one in part.dataset.passages.values()]))
    for name, value in spread(every).items():
        assert found[""][f"passages/{name}"][""] == pytest.approx(value, rel=1e-3)
    place = {id: i for i, id in enumerate(run_lib.sample(run).ids)}
    ids = [f"towns/{one.id}" for one in part.dataset.passages.values()]
    for pair, value in found[""][PAIRS].items():
        i, j = map(ids.index, pair.split())
        assert (place[ids[j]] - place[ids[i]]) % 40 in (1, 2, 3, 4)
        assert value == pytest.approx(every[i] @ every[j], abs=1e-4)
    assert len(found[""][PAIRS]) == 160
    few = run_lib.sample(run, 9)
    assert few.ids == run_lib.sample(past[0], 9).ids and len(set(few.ids)) == 9
    assert [f"towns/{one.id}" for one in few.passages] == few.ids


@pytest.mark.slow
def test_spaces_of_a_run(run):
    """Bugs: states before the last norm; control tokens or padding among the likeliest; the title
    of another passage, or a shuffled one that is its own; a hidden state of the wrong tower."""
    (part,), found, tokenizer = run.sets, spaces(run), run.trained.tokenizers.gen
    held_to_its_word("spaces", found)
    no_empty_words("spaces", found)
    kernel = np.asarray(run.trained.params["gen"]["head"]["kernel"], np.float64)
    text = [i for i in range(tokenizer.vocab_size) if i not in tokenizer.control]

    def share(state, passage):
        logits = state @ kernel
        top = sorted(text, key=lambda i: -logits[i])[:50]
        title = set(tokenizer.encode(passage.title))
        return len(title & set(top)) / len(title)

    for example in part.examples[:4]:
        passage = part.dataset.passages[example.evidence[0]]
        at_ret = state_at_ret(run, example)
        assert found[SET]["title_at_ret"][example.id] == pytest.approx(share(at_ret, passage))
        in_vector = found[""]["title_in_vector"][f"towns/{passage.id}"]
        assert in_vector == pytest.approx(share(vector(run, passage), passage))
    assert found[SET]["passages_in_index"][""] == pytest.approx(40 / (40 + len(text)))
    assert found[SET]["mutual_nearest_most"] == {"": 1}
    endings = ("", "_shuffled", "_centred", "_centred_shuffled")
    for name in ("title_in_vector", "mutual_knn10"):
        assert all(len(found[""][f"{name}{ending}"]) == 40 for ending in endings)
    chance = np.mean(list(found[""]["mutual_knn10_shuffled"].values()))
    assert chance == pytest.approx(10 / 39, abs=0.08)
    table = np.asarray(run.trained.params["gen"]["embed"]["table"], np.float64)
    passages = list(part.dataset.passages.values())
    means = [table[tokenizer.encode(markup.passage_text(p))].mean(0) for p in passages]
    own, tokens = (
        neighbours(unit(np.stack(x))) for x in ([vector(run, p) for p in passages], means)
    )
    for p, value in zip(passages, overlap(own, tokens), strict=True):
        assert found[""]["mutual_knn10"][f"towns/{p.id}"] == pytest.approx(value)


@pytest.mark.slow
def test_spaces_over_training_of_a_run(run):
    """Bugs: the newest checkpoint's shares under every step's name; queries of one step beside the
    passages of another."""
    found, endings = spaces_over_training(run), ("", "_shuffled", "_centred", "_centred_shuffled")
    shares = {f"{name}{end}" for name in ("title_in_vector", "mutual_knn10") for end in endings}
    of_set = {f"title_at_ret{end}" for end in endings} | {
        "mutual_nearest",
        "mutual_nearest_centred",
    }
    for held_out, names in (("", shares), (SET, of_set)):
        assert found[held_out].keys() == {
            f"{name}/step_{step}" for name in names for step in (1, 2)
        }
    for at in run_lib.over_training(run):
        for held_out, metrics in spaces(at).items():
            for name in metrics.keys() & (shares | of_set):
                assert found[held_out][f"{name}/step_{at.trained.step}"] == metrics[name]
    held_to_its_word("spaces_over_training", found)
    knn = [found[""][f"mutual_knn10/step_{step}"] for step in (1, 2)]
    assert knn[0] != knn[1]


@pytest.mark.slow
def test_measures_of_a_run_share_what_they_read(run, monkeypatch):
    """Bugs: Ctx reads a passage, or Gen a question, once for every measure that wants it; what is
    kept is another checkpoint's, or another set's."""
    read = {"corpus": 0, "queries": 0}

    def counted(owner, name):
        original = getattr(owner, name)

        def count(self, params, what, *more):
            read[name] += more[0] if more else len(what.examples)
            return original(self, params, what, *more)

        monkeypatch.setattr(owner, name, count)

    counted(run_lib.Encoder, "corpus")
    counted(run_lib.Evaluator, "queries")
    run = run._replace(read=run_lib.Read({}, {}))
    spaces(run), plane(run)
    assert read == {"corpus": 40, "queries": 12}
    spaces_over_training(run), geometry(run)  # of the checkpoint before, too
    assert read == {"corpus": 80, "queries": 24}
    (part,) = run_lib.sets(run.trained, run.workdir, run.store, 5)  # of the same name
    assert len(run_lib.asked(run, part).ids) == 5
    assert run_lib.vectors(run, []).shape == (0, 32)


@pytest.mark.slow
def test_gradients_of_a_run(run):
    """Bugs: layers mixed up, or the first layer's cosine for all; weights, or a loss that the run
    does not train, in a gradient; a cosine where NSP's gradient is zero."""
    trained, config = run.trained, run.trained.config
    found = gradients(run)[""]
    held_to_its_word("gradients", {"": found})
    loss = dataclasses.replace(config.loss, nsp_weight=1.0)
    rows = sharding.rows(trained.mesh)
    batch = pipeline.batch_at(run.store, Plan(run.store, config), config, rows, rows, 3)
    config = dataclasses.replace(config, loss=loss)

    @jax.jit
    def gradient(params, ntp):
        terms = lambda p: cosup.terms(p, batch, None, 3, trained.towers, config)
        return jax.grad(lambda p: jnp.where(ntp, terms(p).ntp, terms(p).nsp))(params)["gen"]

    ntp, nsp = (jax.device_get(gradient(trained.params, which)) for which in (True, False))
    layer = lambda tree, i: {"/".join(p): x[i] for p, x in flatten_dict(tree["blocks"]).items()}
    parts = {f"layer_{i}": (layer(ntp, i), layer(nsp, i)) for i in range(2)}
    parts |= {"embed": (ntp["embed"], nsp["embed"]), "gen": (ntp, nsp)}
    parts["final_norm"] = ntp["final_norm"], nsp["final_norm"]
    steps = ("step_1", "step_2")
    assert found.keys() == {f"gradient_cosine/{name}/{step}" for name in parts for step in steps}
    for name, trees in parts.items():
        a, b = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for tree in trees)
        values = found[f"gradient_cosine/{name}/step_2"]
        assert list(values) == [f"step_{step}" for step in range(2, 6)]
        assert values["step_3"] == pytest.approx(cosine(a, b), abs=1e-4)
    # A weight that rises to 0.5 at step 4 and stays; NTP's is 3.
    ramp = dataclasses.replace(loss, nsp_weight=0.5, nsp_ramp_steps=4, nsp_ramp_from=0.1)
    ramped = dataclasses.replace(trained.config, loss=ramp)
    weighed = gradients(run._replace(trained=trained._replace(config=ramped)))[""]
    held_to_its_word("gradients", {"": weighed})
    no_empty_words("gradients", {"": weighed})
    for name, values in found.items():
        assert weighed[name] == pytest.approx(values, abs=1e-5)
    norms = [np.sqrt(sum(np.vdot(x, x) for x in jax.tree.leaves(tree))) for tree in (nsp, ntp)]
    ratio = weighed["gradient_ratio/step_2"]["step_3"]
    assert ratio == pytest.approx(0.4 / 3 * norms[0] / norms[1], rel=1e-4)
    first, last = (found[f"gradient_cosine/gen/{step}"] for step in steps)
    assert list(first) == [f"step_{step}" for step in range(1, 5)]
    assert first["step_3"] != pytest.approx(last["step_3"], abs=1e-3)
    frozen = dataclasses.replace(config, gen=dataclasses.replace(config.gen, freeze=True))
    assert gradients(run._replace(trained=trained._replace(config=frozen))) == {"": {}}


@pytest.mark.slow
def test_evidence_of_a_run(run):
    """Bugs: a target off by one; a neighbour in the row that is seen; a swapped passage that is
    not what was meant; nats that count [Ret] or the passage; a probability of control tokens."""
    (part,), found, tokenizer = run.sets, evidence(run)[SET], run.trained.tokenizers.gen
    held_to_its_word("evidence", {SET: found})
    no_empty_words("evidence", {SET: found})
    kernel = np.asarray(run.trained.params["gen"]["head"]["kernel"], np.float64)
    padding = range(tokenizer.vocab_size, kernel.shape[1])
    turned, skipped = conflicts(part, tokenizer, run.trained.config)
    assert len(turned) == 12 and not skipped and found["questions"] == {"": 12}

    def nats(example, said, passage=None):
        """Of the text that training would make of a question that is answered so."""
        output = f"[Ret:{passage.id}]{said}[Ce]" if passage else said
        given = {passage.id: passage} if passage else {}
        marked = training_text(run, dataclasses.replace(example, output=output), given)
        tokens = marked.tokens.tolist()
        begin = tokens.index(tokenizer.cs) + 1 if passage else marked.roles.tolist().index(1)
        end = tokens.index(tokenizer.ce if passage else tokenizer.eos)
        logits = hidden(run, "gen", tokens) @ kernel
        logits[:, [*padding, *(tokenizer.control - {tokens[end]})]] = -np.inf
        log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        return -sum(log_p[i - 1, tokens[i]] for i in range(begin, end + 1)), end + 1 - begin

    for one in turned[::4]:
        example, id = one.example, one.example.id
        for name, passage in (("without", None), ("with", one.passage)):
            total, count = nats(example, one.answer, passage)
            value = found[f"answer_nats_{name}_evidence"][id]
            assert value == pytest.approx(total / count, rel=1e-4)
        for name, passage in (("original", one.passage), ("swapped", one.swapped)):
            answer, swap = (nats(example, said, passage)[0] for said in (one.answer, one.swap))
            value = found[f"{name}/swap_over_answer_nats"][id]
            assert value == pytest.approx(answer - swap, abs=1e-3)
            assert found[f"{name}/swap_wins"][id] == (answer > swap)
            share = np.exp(-answer) / (np.exp(-answer) + np.exp(-swap))
            assert found[f"{name}/p_answer"][id] == pytest.approx(share, rel=1e-3)


@pytest.mark.slow
def test_closed_book_of_a_run(run, monkeypatch):
    """Bugs: eval.examples questions and not a thousand; a label, or no answer, is scored; one that
    has no room; questions with seen and with unseen passages exchanged."""
    (part,), tokenizer = run.sets, run.trained.tokenizers.gen
    assert len(part.examples) == 12
    long = " and ".join(["harbour"] * 150)

    made = run_lib.sets

    def more(trained, workdir, store, most):
        (all_of_them,) = made(trained, workdir, store, most)
        assert most == 1000
        examples = list(all_of_them.examples)
        assert len(examples) > 12
        for i, told in enumerate(({"kind": "label"}, {"answers": (long,)}, {"answers": ()})):
            examples[i] = dataclasses.replace(examples[i], long_answer="", **told)
        seen = np.arange(len(all_of_them.seen)) < 5
        return [all_of_them._replace(examples=examples, seen=seen)]

    monkeypatch.setattr(run_lib, "sets", more)
    found = closed_book(run)
    held_to_its_word("closed_book", found)
    no_empty_words("closed_book", found)
    (part,) = more(run.trained, run.workdir, run.store, 1000)
    ids = [one.id for one in part.examples][3:]
    asked = {name.rpartition("/")[2]: list(values) for name, values in found[SET].items()}
    unseen = {"answer_nats_seen": ids[:2], "answer_nats_unseen": ids[2:]}
    assert asked == {"answer_nats": ids} | unseen
    kernel = np.asarray(run.trained.params["gen"]["head"]["kernel"], np.float64)
    padding = range(tokenizer.vocab_size, kernel.shape[1])
    for example in part.examples[3::7]:
        said = example.long_answer or example.answers[0]
        marked = training_text(run, dataclasses.replace(example, output=said), {})
        tokens, begin = marked.tokens.tolist(), marked.roles.tolist().index(1)
        end = tokens.index(tokenizer.eos)
        logits = hidden(run, "gen", tokens) @ kernel
        logits[:, [*padding, *(tokenizer.control - {tokenizer.eos})]] = -np.inf
        log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        nats = -np.mean([log_p[i - 1, tokens[i]] for i in range(begin, end + 1)])
        assert found[SET]["closed_book/answer_nats"][example.id] == pytest.approx(nats, rel=1e-4)


@pytest.mark.slow
def test_majority_of_a_run(run):
    """Bugs: the answer most frequent among the questions themselves, which nobody may know; other
    questions than `answers` asks."""
    examples = run.sets[0].dataset.examples
    train, dev = ([e for e in examples if e.id.endswith("boats") == held] for held in (0, 1))
    answers = collections.Counter(e.answers[0] for e in train)
    most = max(answers.values())
    found = measures.majority(run)
    held_to_its_word("majority", found)
    right = found[SET]["majority/correct"]
    assert right.keys() == {e.id for e in dev}
    said = [a for a, n in answers.items() if n == most]
    assert right in [{e.id: float(a in e.answers) for e in dev} for a in said]


PASSAGES = {
    "o": Passage("o", "Oslo", "Oslo lies in Norway. Norway is north. Norwayan, Asia."),
    "l": Passage("l", "Luxembourg", "Its capital is Luxembourg."),
}


def ask(evidence="o", answers=("Norway",), kind="span", **more):
    evidence = tuple(evidence)
    return Example("o.country.open_qa.0", "open_qa", "Where?", answers, evidence, kind=kind, **more)


def test_a_passage_is_turned_around():
    """Bugs: a word that begins as the answer does is changed; an answer that stays somewhere; a
    swap that the passage says already, or that is an answer too."""
    pool = ["Asia", "Norway", "Noreg", "Peru", "Oslo"]
    made = conflict(ask(answers=("Norway", "Noreg")), PASSAGES, pool)
    assert (made.answer, made.swap) == ("Norway", "Peru")
    assert made.swapped.text == "Oslo lies in Peru. Peru is north. Norwayan, Asia."
    assert made.swapped.title == "Oslo" and made.passage == PASSAGES["o"]
    drawn = {
        conflict(dataclasses.replace(ask(), id=f"{i}"), PASSAGES, ["Peru"] * 3 + ["Fiji"]).swap
        for i in range(30)
    }
    assert drawn == {"Peru", "Fiji"}


@pytest.mark.parametrize(
    ("example", "reason"),
    [
        (ask("ol"), "no_span"),
        (ask(""), "no_span"),
        (ask(kind="label"), "no_span"),
        (ask(output="[Ret:o]Norway[Ce]"), "no_span"),
        (ask(answers=("Asian",)), "not_in_text"),
        (ask("l", ("Luxembourg",)), "in_title"),
        (ask(), "no_other"),
    ],
)
def test_what_cannot_be_turned_around_is_counted(example, reason):
    """Bugs: a question without a conflict scored all the same, or dropped in silence; a passage
    about Luxembourg made one about Peru."""
    assert conflict(example, PASSAGES, ["Asia"] if reason == "no_other" else ["Peru"]) == reason


@pytest.mark.slow
def test_what_fits_no_row_is_counted(run):
    """Bug: a passage that is cut, perhaps before its answer, or a row that does not hold it."""
    c = run.trained.config
    for limit in ({"max_ctx_tokens": 9}, {"max_gen_tokens": 40}):
        short = dataclasses.replace(c, data=dataclasses.replace(c.data, **limit))
        assert conflicts(run.sets[0], run.trained.tokenizers.gen, short) == ([], {"too_long": 12})


def test_a_relation_is_what_is_asked():
    """Bug: a latitude in place of a country."""
    assert relation("world", ask()) == "country"
    assert relation("towns", ask()) == "open_qa span" != relation("towns", ask(kind="label"))
