"""A scan's tokens in as many boxes as a budget has tokens, of nearly equal size and shape."""

from functools import cache

import torch

SHAPE = (1, 2, 2)  # a token is twice as wide as it is deep


@cache
def boxes(size, count):
    """`count` boxes that fill a grid: a tuple of ((from, to) along depth, rows, columns), in the order of the splits.

    A box is halved along its longest side until each has one part, so any count up to the number of tokens works.
    """
    found = []

    def split(box, parts):
        lengths = [end - begin for begin, end in box]
        if parts < 2:
            found.extend([box] * parts)
            return
        axis = max(range(3), key=lambda i: (lengths[i] > 1, lengths[i] * SHAPE[i]))
        begin, end = box[axis]
        middle = begin + lengths[axis] // 2
        layer = lengths[0] * lengths[1] * lengths[2] // lengths[axis]  # tokens for each step along the axis
        first, second = (middle - begin) * layer, (end - middle) * layer
        share = round(parts * first / (first + second))
        share = min(max(share, 1, parts - second), first, parts - 1)
        split((*box[:axis], (begin, middle), *box[axis + 1 :]), share)
        split((*box[:axis], (middle, end), *box[axis + 1 :]), parts - share)

    split(tuple((0, n) for n in size), count)
    return tuple(found)


def box_of_tokens(coordinates, count):
    """Which of `count` boxes each token of a row is in, (V,) long, -1 for none, and each box's middle token (count,).

    Several scans share the count by their tokens. coordinates (V, 4): scan, depth, row, column.
    """
    label = coordinates.new_full((len(coordinates),), -1)
    middles, begin, given = [], 0, 0
    for tokens in coordinates[:, 0].bincount().tolist():
        places = coordinates[begin : begin + tokens, 1:]
        size = tuple((places.amax(0) + 1).tolist())
        share = count * (begin + tokens) // len(coordinates) - given
        inside = torch.arange(tokens, device=label.device).view(size)
        for box in boxes(size, share):
            part = inside[tuple(slice(*side) for side in box)]
            label[begin + part.flatten()] = len(middles)
            middles.append(begin + int(part[tuple((n - 1) // 2 for n in part.shape)]))
        begin, given = begin + tokens, given + share
    return label, torch.tensor(middles, dtype=torch.long, device=label.device)
