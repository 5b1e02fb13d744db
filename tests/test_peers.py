"""Each published selection method against its formula in plain loops, on small numbers.

python -m pytest tests/test_peers.py
"""

import itertools
import math

import pytest
import torch

from conftest import collate, three_rows, tiny_config, tiny_model
from photon.schedulers import SCHEDULERS, use_scheduler
from photon.schedulers.boxes import box_of_tokens, boxes
from photon.schedulers.pyramid import Stage, cut_layers
from photon.schedulers.recorders import record_voxels
from photon.schedulers.rows import Row, evenly, top
from photon.schedulers.sparsevlm import density_peaks
from photon.scheduling_photon import SchedulerInputs, TokenScheduler

ROWS = three_rows()
GRIDS = [(4, 3, 2), (2, 2, 5)]  # depth, rows, columns of a row's scans: 24 and 20 tokens
WIDTH, HEADS, GROUPS, SIZE, QUESTION = 12, 4, 2, 6, 5


def small_row(seed=0, grids=GRIDS, **more):
    """A row of random numbers about scans of these grids, and its coordinates as a list."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    places = [(n, *place) for n, grid in enumerate(grids) for place in itertools.product(*map(range, grid))]
    count = len(places)
    row = Row(
        draw(HEADS, QUESTION, SIZE), draw(GROUPS, QUESTION, SIZE), draw(GROUPS, count, SIZE), SIZE**-0.5,
        draw(count, WIDTH), draw(QUESTION, WIDTH), torch.tensor(places), draw(count).exp(), draw(count, SIZE),
        {name: draw(count, *shape) for name, shape in more.items()},
    )  # fmt: skip
    return row, places


def method(name, **settings):
    torch.manual_seed(1)
    config = tiny_config()
    return SCHEDULERS[name](TokenScheduler(config.text_config.hidden_size, config), **settings)


def places_of(mask):
    return mask.nonzero()[:, 0].tolist()


def cosine(a, b):
    return float((a * b).sum() / (a.norm() * b.norm()))


def highest(scores, count):
    """Places of the `count` highest of a list, in order of place."""
    return sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count])


def attention_by_hand(row, head, query):
    """Softmax over the visual tokens of one query, as a list."""
    keys = row.visual_keys[head * GROUPS // HEADS]
    logits = [float((query * key).sum()) * row.scaling for key in keys]
    total = sum(math.exp(x) for x in logits)
    return [math.exp(x) / total for x in logits]


# === Controls ========================================================================================================


@pytest.mark.parametrize("size", [(4, 3, 2), (2, 7, 5), (1, 1, 9)])
def test_boxes_fill_the_grid(size):
    total = math.prod(size)
    for count in range(1, total + 1):
        cells = [list(itertools.product(*(range(*side) for side in box))) for box in boxes(size, count)]
        assert len(cells) == count and all(cells)
        assert sorted(sum(cells, [])) == sorted(itertools.product(*map(range, size)))
        assert max(map(len, cells)) <= 3 * min(map(len, cells))
    assert boxes(size, 0) == ()


def test_grid_and_pooling_by_hand():
    row, places = small_row()
    count = 11
    keep, _ = method("grid").choose(row, count)
    pooled, states = method("pooling").choose(row, count)
    assert torch.equal(keep, pooled) and int(keep.sum()) == count
    of_first, begin = count * 24 // 44, 0
    kept = []
    for number, (grid, share) in enumerate(zip(GRIDS, (of_first, count - of_first), strict=True)):
        for box in boxes(grid, share):
            inside = [places.index((number, *cell)) for cell in itertools.product(*(range(*side) for side in box))]
            middle = tuple(begin + (end - begin - 1) // 2 for begin, end in box)
            place = places.index((number, *middle))
            kept.append(place)
            mean = sum(row.hidden_states[i] for i in inside) / len(inside)
            torch.testing.assert_close(states[place], mean, atol=1e-6, rtol=1e-5)
        begin += math.prod(grid)
    assert sorted(kept) == places_of(keep)
    others = ~keep
    assert torch.equal(states[others], row.hidden_states[others])


def test_even_steps():
    among = torch.tensor([1, 0, 1, 1, 0, 1, 1, 1, 0, 1], dtype=torch.bool)  # 7 of 10
    assert places_of(evenly(among, 3)) == [0, 5, 7]  # the 1st, 4th and 6th of them: where floor(3 j / 7) rises
    assert not evenly(among, 0).any() and torch.equal(evenly(among, 7), among)


def test_voxels_by_hand():
    """Two scans; patches of a token stand together, slab by slab."""
    generator = torch.Generator().manual_seed(0)
    grids, voxels = [(5, 4, 2), (2, 2, 6)], 7
    parts = [torch.rand(math.prod(grid), voxels, generator=generator) for grid in grids]
    parts[0][16:24] = parts[0][8:16] + 0.01  # slab 2 is nearly slab 1
    parts[0][24:32] = parts[0][8:16] + 0.03  # slab 3 too, and further from it than from slab 2
    visual = type("Tower", (), {"spatial_merge_unit": 4})
    recorded = {}
    with record_voxels(recorded, visual, torch.cat(parts), torch.tensor(grids)):
        pass
    begin = 0
    for (slabs, rows, columns), part in zip(grids, parts, strict=True):
        low, high = float(part.min()), float(part.max())
        per_slab = rows * columns // 4
        tokens = [[(part[4 * (s * per_slab + i) : 4 * (s * per_slab + i) + 4].flatten() - low) / (high - low)
                   for i in range(per_slab)] for s in range(slabs)]  # fmt: skip
        anchor = 0
        for slab in range(slabs):
            distance = sum(float((a - b).abs().mean()) for a, b in zip(tokens[slab], tokens[anchor], strict=True))
            distance /= per_slab
            if slab == 0 or distance > 0.05:
                anchor, distance = slab, 1.0
            for i in range(per_slab):
                change = 1.0 if slab == 0 else float((tokens[slab][i] - tokens[slab - 1][i]).abs().mean())
                expected = torch.tensor([float(tokens[slab][i].mean()), change, distance])
                torch.testing.assert_close(recorded["voxels"][begin], expected, atol=1e-5, rtol=1e-4)
                begin += 1
    assert begin == len(recorded["voxels"])
    assert (recorded["voxels"][2 * 2 : 4 * 2, 2] < 0.05).all()  # slabs 2 and 3 have slab 1 for an anchor


@torch.no_grad()
def test_random_in_the_body_takes_air_last():
    inputs = collate(ROWS)
    patches = inputs["pixel_values_videos"]
    patches[:24] = patches[:24].abs() + 1  # of the first row half the tokens are body, the others air
    patches[24:48] = 0.0
    patches[0, 0] = 0.0
    model = tiny_model()
    use_scheduler(model, "body", seed=3)
    drawn = [model(**inputs, token_budget=budget).keep_mask[0, :12] for budget in (4, 6, 9)]
    assert [int(mask[:6].sum()) for mask in drawn] == [4, 6, 6] and [int(mask.sum()) for mask in drawn] == [4, 6, 9]


@torch.no_grad()
def test_withdraw_leaves_the_text():
    inputs, model = collate(ROWS), tiny_model(scheduler_layer=1)
    use_scheduler(model, "withdraw")
    some, none = model(**inputs, keep_ratio=0.5), model(**inputs, token_budget=0)
    assert not some.keep_mask.any() and torch.equal(some.logits, none.logits)


# === On the vision tower's output ====================================================================================


@pytest.mark.parametrize("count", [5, 17, 30])
def test_hiprune_by_hand(count):
    row, places = small_row(middle_attention=(), middle_keys=(SIZE,))
    keep, _ = method("hiprune").choose(row, count)
    middle, last = row.more["middle_attention"].tolist(), row.vision_attention.tolist()
    anchors = highest(middle, round(0.1 * count / 7))
    near = set()
    for a in anchors:
        for axis, step in itertools.product((1, 2, 3), (-1, 1)):
            moved = list(places[a])
            moved[axis] += step
            if tuple(moved) in places:
                near.add(places.index(tuple(moved)))
    chosen = [*anchors, *(near - set(anchors))]
    rest = [i for i in highest(last, len(last)) if i not in chosen]
    rest.sort(key=lambda i: -last[i])
    assert places_of(keep) == sorted([*chosen, *rest[: count - len(chosen)]])
    assert len(anchors) == (0 if count == 5 else round(count / 70))


def test_hiprune_has_anchors_and_their_neighbours():
    row, places = small_row(grids=[(6, 6, 6)], middle_attention=(), middle_keys=(SIZE,))
    keep, _ = method("hiprune").choose(row, 105)  # one or two anchors
    anchor = places[int(row.more["middle_attention"].argmax())]
    for axis, step in itertools.product((1, 2, 3), (-1, 1)):
        moved = list(anchor)
        moved[axis] += step
        assert tuple(moved) not in places or keep[places.index(tuple(moved))]


@pytest.mark.parametrize("name, share", [("prumerge", 0.0), ("prumerge-plus", 0.75)])
def test_prumerge_by_hand(name, share):
    row, _ = small_row()
    attention, count = row.vision_attention.tolist(), 14
    keep, states = method(name).choose(row, count)
    grid = round(share * (count - 1))
    chosen = highest(attention, count - 1 - grid)
    rest = [i for i in range(44) if i not in chosen]
    chosen = sorted([*chosen, *(j for n, j in enumerate(rest) if n * grid // len(rest) > (n - 1) * grid // len(rest))])
    gone = [i for i in range(44) if i not in chosen]
    assert len(chosen) == 13 and places_of(keep) == sorted([*chosen, gone[0]])
    for i in chosen:
        others = sorted(
            (j for j in range(44) if j != i), key=lambda j: -cosine(row.vision_keys[i], row.vision_keys[j])
        )
        added = sum(attention[j] / 44 * row.hidden_states[j] for j in others[:32])
        torch.testing.assert_close(states[i], row.hidden_states[i] + added, atol=1e-5, rtol=1e-5)
    total = sum(attention[j] / 44 * row.hidden_states[j] for j in gone)
    torch.testing.assert_close(states[gone[0]], total, atol=1e-5, rtol=1e-5)


def batch_of(row):
    """A row as the first of `SchedulerInputs` of two; the second has its first scan alone."""
    visual = torch.ones(2, len(row), dtype=torch.bool)
    visual[1] = row.coordinates[:, 0] == 0

    def twice(values):
        return torch.stack([values, values])

    parts = {name: twice(getattr(row, name)) for name in ("hidden_states", "coordinates", "vision_attention",
             "vision_keys", "question_states")}  # fmt: skip
    return SchedulerInputs(
        twice(row.queries), twice(row.question_keys), twice(row.visual_keys),
        torch.ones(2, QUESTION, dtype=torch.bool), visual, row.scaling, **parts,
        more={name: twice(values) for name, values in row.more.items()},
    )  # fmt: skip


def test_prumerges_own_count_is_its_outliers():
    row, _ = small_row()
    row.vision_attention[[3, 9, 30]] = torch.tensor([40.0, 50.0, 60.0])
    values = sorted(row.vision_attention.tolist())

    def quantile(values, share):
        place = share * (len(values) - 1)
        low = math.floor(place)
        return values[low] + (place - low) * (values[min(low + 1, len(values) - 1)] - values[low])

    counts = []
    for some in (values, sorted(row.vision_attention[:24].tolist())):
        low, high = quantile(some, 0.25), quantile(some, 0.75)
        counts.append(sum(value > high + 1.5 * (high - low) for value in some))
    assert counts[0] > counts[1] >= 2
    inputs = batch_of(row)
    assert method("prumerge", native=True).own_count(inputs).tolist() == [n + 1 for n in counts]
    expected = [min(4 * n + 1, size) for n, size in zip(counts, (44, 24), strict=True)]
    assert method("prumerge-plus", native=True).own_count(inputs).tolist() == expected
    assert method("prumerge", native=True)(inputs).keep_mask.sum(-1).tolist() == [n + 1 for n in counts]
    with pytest.raises(ValueError, match="divprune has no rule of its own"):
        method("divprune", native=True)


def test_divprune_by_hand():
    row, _ = small_row()
    keep, _ = method("divprune").choose(row, 9)
    distance = [[1 - cosine(a, b) for b in row.hidden_states] for a in row.hidden_states]
    chosen = [max(range(44), key=lambda i: min(distance[i][j] for j in range(44) if j != i))]
    while len(chosen) < 9:
        rest = [i for i in range(44) if i not in chosen]
        chosen.append(max(rest, key=lambda i: min(distance[i][j] for j in chosen)))
    assert places_of(keep) == sorted(chosen)


def test_cdpruner_by_hand():
    """The greedy maximum of the determinant, each determinant computed anew."""
    row, _ = small_row(saliency=())
    row.more["saliency"] = row.more["saliency"].sigmoid()
    keep, _ = method("cdpruner").choose(row, 8)
    relevance = row.more["saliency"].tolist()
    kernel = [[relevance[i] * relevance[j] * cosine(row.hidden_states[i], row.hidden_states[j]) for j in range(44)]
              for i in range(44)]  # fmt: skip
    kernel, chosen = torch.tensor(kernel, dtype=torch.float64), []
    while len(chosen) < 8:
        rest = [i for i in range(44) if i not in chosen]
        chosen.append(max(rest, key=lambda i: float(torch.linalg.det(kernel[[*chosen, i]][:, [*chosen, i]]))))
    assert places_of(keep) == sorted(chosen)


def test_cdpruner_beyond_the_rank_takes_the_most_relevant():
    row, _ = small_row(saliency=())
    row.more["saliency"] = row.more["saliency"].sigmoid()
    keep, _ = method("cdpruner").choose(row, 30)  # states have 12 dimensions
    inside, _ = method("cdpruner").choose(row, WIDTH)
    rest = [i for i in highest(row.more["saliency"].tolist(), 44) if not inside[i]]
    rest.sort(key=lambda i: -row.more["saliency"][i])
    assert places_of(keep) == sorted([*places_of(inside), *rest[:18]])


@pytest.mark.parametrize("name", ["evs", "evs-centre"])
def test_evs_by_hand(name):
    row, places = small_row()
    keep, _ = method(name).choose(row, 20)
    first = {0: 2, 1: 1} if name == "evs-centre" else {0: 0, 1: 0}
    scores = []
    for i, (scan, z, y, x) in enumerate(places):
        if z == first[scan]:
            scores.append(9.0)
            continue
        neighbour = places.index((scan, z + (1 if z < first[scan] else -1), y, x))
        scores.append(1 - cosine(row.hidden_states[i], row.hidden_states[neighbour]))
    assert places_of(keep) == highest(scores, 20)


def test_omniv_by_hand():
    row, places = small_row(voxels=(3,))
    row.more["voxels"] = row.more["voxels"].sigmoid()
    first = torch.tensor([place[1] == 0 for place in places])
    row.more["voxels"][first, 1] = 1.0
    change = row.more["voxels"][:, 1].tolist()
    for count in (3, 8, 21):
        keep, _ = method("omniv").choose(row, count)
        must = set()
        for scan, depth in ((0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1)):
            slab = [i for i, place in enumerate(places) if place[:2] == (scan, depth)]
            must.add(max(slab, key=lambda i: (change[i], -i)))
        must = must if count >= 6 else set()
        rest = sorted((i for i in range(44) if i not in must), key=lambda i: (-change[i], i))
        assert places_of(keep) == sorted([*must, *rest[: count - len(must)]])


@pytest.mark.parametrize("count", [40, 22, 5])
def test_tome_by_hand(count):
    row, _ = small_row()
    keep, states = method("tome").choose(row, count)
    tokens = [(i, 1, row.hidden_states[i], row.vision_keys[i]) for i in range(44)]
    while len(tokens) > count:
        pairs = []
        for a in range(0, len(tokens), 2):
            b = max(range(1, len(tokens), 2), key=lambda b: cosine(tokens[a][3], tokens[b][3]))
            pairs.append((cosine(tokens[a][3], tokens[b][3]), a, b))
        pairs = sorted(pairs, reverse=True)[: len(tokens) - count]
        for b in {b for *_, b in pairs}:
            group = [tokens[b], *(tokens[a] for _, a, into in pairs if into == b)]
            size = sum(token[1] for token in group)
            state, key = (sum(token[1] * token[n] for token in group) / size for n in (2, 3))
            tokens[b] = (tokens[b][0], size, state, key)
        gone = {a for _, a, _ in pairs}
        tokens = [token for i, token in enumerate(tokens) if i not in gone]
    assert places_of(keep) == [token[0] for token in tokens] and len(tokens) == count
    assert sum(token[1] for token in tokens) == 44
    for place, _, state, _ in tokens:
        torch.testing.assert_close(states[place], state, atol=1e-5, rtol=1e-4)


def medpruner_row():
    row, places = small_row(grids=[(4, 6, 6), (3, 5, 4)], voxels=(3,))
    gone = torch.tensor([place[:2] in ((0, 2), (1, 1)) for place in places])
    row.more["voxels"][:, 2] = torch.where(gone, 0.01, 1.0)
    row.vision_attention *= 5
    return row, places, gone


def nucleus_by_hand(row, places, gone, tau):
    """Dominant tokens of each slab that stays, and the first token of each other."""
    kept, probability = [], {}
    for slab in dict.fromkeys(place[:2] for place in places):
        inside = [i for i, place in enumerate(places) if place[:2] == slab]
        if gone[inside[0]]:
            kept.append(inside[0])
            continue
        weights = [math.exp(float(row.vision_attention[i]) / 2) for i in inside]
        before = 0.0
        for weight, i in sorted(zip(weights, inside, strict=True), reverse=True):
            probability[i] = before
            if before < tau:
                kept.append(i)
            before += weight / sum(weights)
    return kept, probability


def test_medpruner_by_hand():
    row, places, gone = medpruner_row()
    nucleus, _ = nucleus_by_hand(row, places, gone, 0.9)
    staying = int((~gone).sum())
    targets = min(round(0.05 * staying), staying + 2 - len(nucleus))
    assert method("medpruner", native=True).own_count(batch_of(row))[0] == len(nucleus) + targets
    count = 60
    keep, states = method("medpruner").choose(row, count)
    targets = round(min(0.05 * staying, 10 / 64 * count))
    levels = sorted(nucleus_by_hand(row, places, gone, 2)[1].values())
    tau = next(t for t in levels if len(nucleus_by_hand(row, places, gone, t)[0]) >= count - targets)
    nucleus, _ = nucleus_by_hand(row, places, gone, tau)
    assert len(nucleus) == count - targets  # that many by a threshold
    rest = [i for i in range(len(places)) if i not in nucleus and not gone[i]]
    chosen = [j for n, j in enumerate(rest) if n * targets // len(rest) > (n - 1) * targets // len(rest)]
    assert places_of(keep) == sorted([*nucleus, *chosen])
    joined = {t: [] for t in chosen}
    for i in set(rest) - set(chosen):
        same = [t for t in chosen if places[t][:2] == places[i][:2]]
        if same:
            joined[max(same, key=lambda t: cosine(row.vision_keys[i], row.vision_keys[t]))].append(i)
    assert any(joined.values())
    for target, members in joined.items():
        mean = sum(row.hidden_states[i] for i in members) / max(len(members), 1)
        torch.testing.assert_close(states[target], row.hidden_states[target] + mean, atol=1e-5, rtol=1e-5)
    untouched = [i for i in range(len(places)) if i not in chosen]
    assert torch.equal(states[untouched], row.hidden_states[untouched])


# === By the question =================================================================================================


@pytest.mark.parametrize("count", [4, 20])
def test_sparsevlm_by_hand(count):
    row, _ = small_row()
    keep, states = method("sparsevlm").choose(row, count)
    match = [0.0] * QUESTION
    for state in row.hidden_states:
        logits = [float((state * text).sum()) for text in row.question_states]
        total = sum(math.exp(x) for x in logits)
        match = [m + math.exp(x) / total / 44 for m, x in zip(match, logits, strict=True)]
    raters = [t for t in range(QUESTION) if match[t] >= sum(match) / QUESTION]
    assert 0 < len(raters) < QUESTION
    score = [0.0] * 44
    for head, t in itertools.product(range(HEADS), raters):
        score = [s + a for s, a in zip(score, attention_by_hand(row, head, row.queries[head, t]), strict=True)]
    recycled = int(0.3 * (44 - count))
    clusters = min(int(0.1 * recycled) + 1, count // 2)
    kept = highest(score, count - clusters)
    again = sorted(sorted((i for i in range(44) if i not in kept), key=lambda i: -score[i])[:recycled])
    x = [row.hidden_states[i] for i in again]
    distance = [[float((a - b).norm()) / WIDTH**0.5 for b in x] for a in x]
    density = [math.exp(-sum(d**2 for d in sorted(line)[:5]) / 5) for line in distance]
    furthest = max(map(max, distance))
    peak = [min((distance[i][j] for j in range(len(x)) if density[j] > density[i]), default=furthest)
            for i in range(len(x))]  # fmt: skip
    centres = highest([d * p for d, p in zip(density, peak, strict=True)], clusters)
    assert places_of(keep) == sorted([*kept, *(again[c] for c in centres)])
    for centre in centres:
        members = [i for i in range(len(x)) if i == centre or
                   (i not in centres and min(centres, key=lambda c: distance[i][c]) == centre)]  # fmt: skip
        mean = sum(x[i] for i in members) / len(members)
        torch.testing.assert_close(states[again[centre]], mean, atol=1e-5, rtol=1e-5)


def test_clusters_of_clouds_are_the_clouds():
    generator = torch.Generator().manual_seed(0)
    cloud = torch.randn(3, 12, WIDTH, generator=generator) * 0.1 + torch.randn(3, 1, WIDTH, generator=generator)
    centres, label = density_peaks(cloud.flatten(0, 1), 3)
    assert sorted(c // 12 for c in centres.tolist()) == [0, 1, 2]
    assert all(len(set(part.tolist())) == 1 for part in label.view(3, 12)) and label.unique().numel() == 3


def test_ivtp_by_hand():
    row, _ = small_row()
    keep, _ = method("ivtp").choose(row, 9)
    first = highest(row.vision_attention.tolist(), round(math.sqrt(9 * 44)))
    central = [0.0] * QUESTION  # how much the question's tokens attend to one another
    for head, t, other in itertools.product(range(HEADS), range(QUESTION), range(QUESTION)):
        if t != other:
            key = row.question_keys[head * GROUPS // HEADS, other]
            central[t] += max(float((row.queries[head, t] * key).sum()) * row.scaling, 0)
    weights = [c / sum(central) for c in central]
    score = [0.0] * 44
    for head in range(HEADS):
        pooled = sum(w * q for w, q in zip(weights, row.queries[head], strict=True))
        score = [s + a for s, a in zip(score, attention_by_hand(row, head, pooled), strict=True)]
    assert places_of(keep) == sorted(sorted(first, key=lambda i: -score[i])[:9])


def test_transprune_by_hand():
    row, _ = small_row(transitions=(4, 2))
    row.more["transitions"] = row.more["transitions"].sigmoid()
    keep, _ = method("transprune").choose(row, 12)
    variation = [0.0] * 44
    for module in range(4):
        moved = [math.exp(1 - float(c)) for c in row.more["transitions"][:, module, 1]]
        ratio = row.more["transitions"][:, module, 0].tolist()
        variation = [v + r * m / sum(moved) for v, r, m in zip(variation, ratio, moved, strict=True)]
    read = [0.0] * 44
    for head, t in itertools.product(range(HEADS), range(QUESTION)):
        read = [s + a for s, a in zip(read, attention_by_hand(row, head, row.queries[head, t]), strict=True)]
    score = [v / sum(variation) + a / sum(read) for v, a in zip(variation, read, strict=True)]
    assert places_of(keep) == highest(score, 12)


def seen_by(name, scheduler_layer, row=2, **options):
    """`SchedulerInputs` of one row in a tiny model, with the model, its inputs and its output."""
    model, inputs, held = tiny_model(scheduler_layer=scheduler_layer), collate([ROWS[row]]), []
    use_scheduler(model, name)
    scheduler = model.model.language_model.scheduler
    scheduler.register_forward_pre_hook(lambda module, args: held.append(args[0]))
    with torch.no_grad():
        output = model(**inputs, **options)
    return held[0], model, inputs, output


def test_transitions_are_those_of_the_layers():
    """Against the residual stream: what a layer adds is its attention's output and then its MLP's."""
    found, model, inputs, _ = seen_by("transprune", 1, token_budget=9)
    states = {}
    for number, layer in enumerate(model.model.language_model.layers[:2]):
        for part in ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp"):
            module = getattr(layer, part)
            module.register_forward_hook(lambda m, a, out, key=(number, part): states.__setitem__(key, out))
    with torch.no_grad():
        model(**inputs, token_budget=9)
    visual = inputs["mm_token_type_ids"][0] == 2
    for number, (norm, part) in itertools.product(range(2), (("input_layernorm", "self_attn"),
                                                             ("post_attention_layernorm", "mlp"))):  # fmt: skip
        out = states[number, part]
        into, out = states[number, norm][0, visual], (out[0] if isinstance(out, tuple) else out)[0, visual]
        expected = torch.stack([out.norm(dim=-1) / into.norm(dim=-1), torch.cosine_similarity(into, out, dim=-1)], -1)
        place = 2 * number + (part == "mlp")
        torch.testing.assert_close(found.more["transitions"][0, :, place], expected, atol=1e-6, rtol=1e-5)
    assert found.more["transitions"].shape[2] == 4


def test_queries_are_those_of_the_scoring_layer():
    found, model, inputs, _ = seen_by("atp", 1, token_budget=9)
    decoder, held = model.model.language_model, []
    scoring = decoder.layers[1]
    scoring.register_forward_pre_hook(lambda m, args, kwargs: held.append((args[0], kwargs)), with_kwargs=True)
    with torch.no_grad():
        model(**inputs, token_budget=9)
        ((states, kwargs),) = held
        index = (inputs["mm_token_type_ids"] == 2).nonzero()[None, :, 1]
        expected = scoring.scores(states, kwargs["position_embeddings"], {"queries": index}, {})["queries"]
    torch.testing.assert_close(found.more["layer_queries"], expected.transpose(1, 2), atol=1e-6, rtol=1e-5)


def test_atp_by_hand():
    row, _ = small_row(layer_queries=(HEADS, SIZE))
    atp = method("atp")
    with torch.no_grad():
        atp.thresholds.weight.normal_(0, 1)
        keep, _ = atp.choose(row, 10)
    own, cross = [0.0] * 44, [0.0] * 44
    for head in range(HEADS):
        keys = row.visual_keys[head * GROUPS // HEADS]
        for i in range(44):
            logits = [float((row.more["layer_queries"][i, head] * key).sum()) * row.scaling for key in keys]
            own[i] += sum(logits) / 44 / HEADS
        for t in range(QUESTION):
            seen = attention_by_hand(row, head, row.queries[head, t])
            cross = [c + a / HEADS / QUESTION for c, a in zip(cross, seen, strict=True)]
    own, cross = ([(v - min(x)) / (max(x) - min(x)) for v in x] for x in (own, cross))
    redundancy = [(a + b) / 2 for a, b in zip(own, cross, strict=True)]
    _, grid = box_of_tokens(row.coordinates, 11)
    spatial = [0.25 if i in grid.tolist() else 0.0 for i in range(44)]
    pooled = []
    for score in (redundancy, spatial):
        for n in range(16):
            part = score[math.floor(n * 44 / 16) : math.ceil((n + 1) * 44 / 16)]
            pooled.append(sum(part) / len(part))
    weight, bias = atp.thresholds.weight.tolist(), atp.thresholds.bias.tolist()
    first, second = (
        1 / (1 + math.exp(-b - sum(w * p for w, p in zip(line, pooled, strict=True))))
        for line, b in zip(weight, bias, strict=True)
    )
    margin = [max(r - first, s - second) for r, s in zip(redundancy, spatial, strict=True)]
    assert places_of(keep) == highest(margin, 10)
    assert atp.own_count(batch_of(row))[0] == sum(m > 0 for m in margin)


def test_atp_learns_with_all_tokens_and_a_mask():
    """Training deletes nothing; thresholds get a gradient; a mask of nearly 0 is nearly a deletion."""
    inputs = collate(three_rows(answers=True))
    model = tiny_model(scheduler_layer=1)
    use_scheduler(model, "atp")
    atp = model.model.language_model.scheduler
    model.train()
    out = model(**inputs)
    assert out.keep_mask.sum(-1).tolist() == out.visual_count.tolist()
    out.loss.backward()
    assert atp.thresholds.bias.grad.abs().min() > 0 and atp.thresholds.weight.grad.abs().max() > 0
    with torch.no_grad():
        atp.thresholds.bias.fill_(20.0)  # thresholds of 1 ...
        model.model.language_model.scheduler_phase = "hard"
        masked = model(**inputs)
    assert (masked.keep_prob[:, 0] < 0.5).all()  # ... above nearly all scores


def test_methods_within_the_decoder_refuse_a_cut_before_it():
    for name in ("atp", "transprune"):
        with pytest.raises(ValueError, match=f"{name} reads decoder layers below the cut"):
            use_scheduler(tiny_model(scheduler_layer=-1), name)


# === Several cuts ====================================================================================================


def test_where_a_pyramid_cuts():
    assert cut_layers(7, 32) == [7, 15, 23]  # after layers 8, 16 and 24, counted from 1, as the paper
    assert cut_layers(8, 36) == [8, 17, 26] and cut_layers(-1, 36) == [-1, 11, 23]
    assert cut_layers(0, 4) == [0, 1, 2] and cut_layers(-1, 4) == [-1, 1, 2]
    assert cut_layers(2, 4) == [2] and cut_layers(3, 4) == [3]  # a cut above the last layer leaves nothing to do


@pytest.mark.parametrize("layer, cuts", [(-1, [-1, 1, 2]), (0, [0, 1, 2]), (1, [1, 2])])
@torch.no_grad()
def test_each_layer_of_a_pyramid_holds_its_budget(layer, cuts):
    inputs, model = collate(ROWS), tiny_model(scheduler_layer=layer)
    use_scheduler(model, "pyramid")
    text = (inputs["mm_token_type_ids"] != 2) & inputs["attention_mask"].bool()
    for share in (0.125, 0.4):
        out = model(**inputs, keep_ratio=share, use_cache=True)
        final = torch.tensor([round(share * int(count)) for count in out.visual_count])
        assert out.keep_mask.sum(-1).tolist() == final.tolist()
        kept = [text.sum(-1) + out.visual_count]
        for number in range(1, len(cuts) + 1):
            of_row = [
                round(v * (k / v) ** (number / len(cuts)))
                for v, k in zip(out.visual_count.tolist(), final.tolist(), strict=True)
            ]
            kept.append(text.sum(-1) + torch.tensor(of_row))
        cache = out.past_key_values
        for number in range(4):
            stage = sum(cut < number for cut in cuts)
            longest = inputs["input_ids"].shape[1] if stage == 0 else int(kept[stage].max())
            assert cache.layers[number].keys.shape[2] == longest
            assert cache.get_seq_length(number) == inputs["input_ids"].shape[1]
        masks = [cache.cut, *cache.cut.later]
        assert [mask.mask.sum(-1).tolist() for mask in masks] == [some.tolist() for some in kept[1:]]
        assert torch.equal(cache.cut.keep_mask, out.keep_mask)
        assert ((out.keep_index >= 0).sum(-1) == kept[-1]).all()


@torch.no_grad()
def test_a_pyramid_cuts_by_the_last_tokens_attention():
    """Against the attention weights of an eager model, of layers on sequences that get shorter."""
    inputs, model = collate([ROWS[2]]), tiny_model(scheduler_layer=0, attention="eager")
    use_scheduler(model, "pyramid")
    out = model(**inputs, token_budget=5, output_attentions=True)
    visual, places = (inputs["mm_token_type_ids"][0] == 2).tolist(), list(range(inputs["input_ids"].shape[1]))
    for layer, count in enumerate((20, 10, 5)):  # of 40
        read = out.attentions[layer][0, :, -1].mean(0).tolist()
        assert len(read) == len(places)
        best = sorted((p for p in places if visual[p]), key=lambda p: -read[places.index(p)])[:count]
        places = [p for p in places if not visual[p] or p in best]
    assert out.keep_index[0].tolist() == places
    assert out.attentions[3].shape[-1] == len(places)
    use_scheduler(model, "fastv")  # is its first cut
    first = model(**inputs, token_budget=20, output_attentions=True)
    assert torch.equal(out.attentions[1], first.attentions[1])


@torch.no_grad()
def test_a_pyramids_own_budget_is_the_papers():
    inputs, model = collate(ROWS), tiny_model(scheduler_layer=0)
    use_scheduler(model, "pyramid", native=True)
    assert model(**inputs).keep_mask.sum(-1).tolist() == [round(0.125 * count) for count in (12, 28, 40)]


@pytest.mark.parametrize("layer", [-1, 0])
@torch.no_grad()
def test_a_pyramid_is_deletion_and_not_a_mask(layer, monkeypatch):
    """A forward through all tokens in which deleted ones are hidden from the layers above their cut."""
    inputs, model, chosen = collate([ROWS[1]]), tiny_model(scheduler_layer=layer), []
    use_scheduler(model, "pyramid")
    choose = Stage.choose

    def note(self, *args):
        keep, short = choose(self, *args)
        chosen.append(keep)
        return keep, short

    scheduler = model.model.language_model.scheduler
    handle = scheduler.register_forward_hook(lambda module, args, out: chosen.append(out.keep_mask.clone()))
    monkeypatch.setattr(Stage, "choose", note)
    out = model(**inputs, keep_ratio=0.2)
    handle.remove()
    visual = (inputs["mm_token_type_ids"][0] == 2).nonzero()[:, 0]
    hooks, cuts = [], cut_layers(layer, 4)
    for number, block in enumerate(model.model.language_model.layers):
        stage = sum(cut < number for cut in cuts)
        if not stage:
            continue
        gone = visual[~chosen[stage - 1][0]]

        def hide(module, args, kwargs, gone=gone):
            length = args[0].shape[1] if args else kwargs["hidden_states"].shape[1]
            mask = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
            mask[..., gone] = False
            mask[..., gone, gone] = True  # a token of its own, that no other reads
            return args, kwargs | {"attention_mask": mask}

        hooks.append(block.register_forward_pre_hook(hide, with_kwargs=True))
    hidden = model(**inputs, use_scheduler=False).logits
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(out.logits[0], hidden[0, out.keep_index[0]], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("fields", [{}, {"evict_early_layers": True}, {"scheduler_layer": 1}])
def test_a_pyramid_answers_by_lookup_and_again(fields):
    """Layers that hold unlike numbers of tokens, of which candidates are taken back, and a second question."""
    inputs, model = collate([ROWS[2]]), tiny_model(**{"scheduler_layer": 0, **fields})
    use_scheduler(model, "pyramid")
    options = {"keep_ratio": 0.2, "do_sample": False, "max_new_tokens": 9}
    plain = model.generate(**inputs, **options, return_dict_in_generate=True)
    assert torch.equal(model.generate(**inputs, **options, prompt_lookup_num_tokens=3), plain.sequences)
    again = torch.cat([plain.sequences, torch.tensor([[70, 71, 72]])], dim=1)
    with torch.no_grad():
        cache = model(**inputs, keep_ratio=0.2, use_cache=True).past_key_values
        new = again[:, inputs["input_ids"].shape[1] :]
        ahead = model(input_ids=new, past_key_values=cache, attention_mask=torch.ones_like(again)).logits
        cache = model(**inputs, keep_ratio=0.2, use_cache=True).past_key_values
        steps = [model(input_ids=new[:, i : i + 1], past_key_values=cache).logits for i in range(new.shape[1])]
    torch.testing.assert_close(torch.cat(steps, dim=1), ahead, atol=2e-5, rtol=1e-4)


def test_a_pyramid_trains_and_is_loaded_again(tmp_path):
    inputs, model = collate(three_rows(answers=True)), tiny_model(scheduler_layer=0)
    use_scheduler(model, "pyramid")
    model.train()
    out = model(**inputs, keep_ratio=0.2)
    assert out.keep_mask.sum(-1).tolist() == [round(0.2 * count) for count in (12, 28, 40)]
    out.loss.backward()
    decoder = model.model.language_model
    for layer in decoder.layers:
        assert layer.self_attn.q_proj.weight.grad.abs().max() > 0 and layer.mlp.down_proj.weight.grad.abs().max() > 0
    assert model.model.visual.patch_embed.proj.weight.grad.abs().max() > 0
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs, keep_ratio=0.2).lm_loss, out.lm_loss.detach())
        expected = model(**inputs, keep_ratio=0.2).logits
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    use_scheduler(loaded, "pyramid")
    with torch.no_grad():
        assert torch.equal(loaded(**inputs, keep_ratio=0.2).logits, expected)


def test_a_pyramid_needs_the_scan_in_its_layers_anew():
    model, inputs = tiny_model(), collate([ROWS[0]])
    use_scheduler(model, "pyramid")
    prefix = model.encode_scan(**inputs, reuse="select")
    text = {name: value for name, value in inputs.items() if name != "pixel_values_videos"}
    with pytest.raises(ValueError, match="cuts again"):
        model.generate(**text, scan=prefix, keep_ratio=0.4, max_new_tokens=2)


# === The resampler ===================================================================================================


def test_perceiver_by_hand():
    """Against plain loops over latents and heads."""
    row, places = small_row()
    row.hidden_states = torch.randn(44, 32, generator=torch.Generator().manual_seed(0))
    perceiver = method("perceiver")
    with torch.no_grad():
        keep, states = perceiver.choose(row, 40)
        latents = perceiver.latents.clone()
        code = torch.zeros(44, 64)
        for i, (_, z, y, x) in enumerate(places):
            angles = [value * 100.0 ** (-n / 10) for value in (z, y, x) for n in range(10)]
            code[i, :60] = torch.tensor([*map(math.sin, angles), *map(math.cos, angles)])
        layer, new = perceiver.layers[0], []
        normed = layer.norm_latents(latents)
        read = [*layer.norm_tokens(row.hidden_states), *normed]
        for latent, before in zip(normed, latents, strict=True):
            parts = []
            for head in range(8):
                part = slice(64 * head, 64 * head + 64)
                query = layer.queries(latent)[part]
                keys = [layer.keys_values(token)[part] for token in read]
                keys = [key + (code[i] if i < 44 else 0) for i, key in enumerate(keys)]
                values = [layer.keys_values(token)[512:][part] for token in read]
                weights = torch.tensor([float((query * key).sum()) / 8 for key in keys]).softmax(0)
                parts.append(sum(w * v for w, v in zip(weights, values, strict=True)))
            after = before + layer.output(torch.cat(parts))
            new.append(after + layer.mlp(after))
        one = perceiver.layers[0](perceiver.latents, row.hidden_states, code)
        torch.testing.assert_close(one, torch.stack(new), atol=1e-4, rtol=1e-4)
        whole = perceiver.latents
        for layer in perceiver.layers:
            whole = layer(whole, row.hidden_states, code)
        expected = perceiver.output(perceiver.norm(whole))
    assert int(keep.sum()) == 32
    torch.testing.assert_close(states[keep], expected, atol=1e-4, rtol=1e-4)
    few, some = perceiver.choose(row, 7)
    torch.testing.assert_close(some[few], expected[:7], atol=1e-4, rtol=1e-4)


def test_perceiver_learns():
    inputs = collate(three_rows(answers=True))
    model = tiny_model(scheduler_layer=-1)
    use_scheduler(model, "perceiver")
    perceiver = model.model.language_model.scheduler
    model.train()
    model(**inputs, keep_ratio=0.4).loss.backward()
    for name, parameter in perceiver.named_parameters():
        if not name.startswith("reference."):
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    assert model.model.visual.patch_embed.proj.weight.grad.abs().max() > 0  # through the latents


def test_top_takes_the_first_of_equals():
    assert places_of(top(torch.tensor([1.0, 2.0, 2.0, 2.0, 0.0]), 2)) == [1, 2]
