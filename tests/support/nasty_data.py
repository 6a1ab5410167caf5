"""Nasty models, kind ``data``: what forward does depends on the numbers in its tensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from nasty_base import STEPS, WIDTH, Registry, Small, features, sequences, tokens, two
from torch import nn

data = Registry("data")


@data.forward()
def item_as_a_factor(self, x):
    return self.out(self.lin(x) * x.abs().mean().item())


@data.forward()
def item_with_gradient_cut(self, x):
    h = self.lin(x)
    return self.out(h / float(h.norm()) + int(h.sum()))


@data.forward()
def branch_on_sum(self, x):
    return self.out(self.lin(x).tanh() if x.sum() > 0 else -x)


@data.forward()
def branch_on_any_and_all(self, x):
    h = self.lin(x)
    if (x > 2).any() or not (x > -2).all():
        h = h.clamp(-1, 1)
    return self.out(h)


@data.forward()
def branch_inside_a_generator(self, x):
    return self.out(self.lin(x) * (2 if any(row.sum() > 2 for row in x) else 3))


@data.forward()
def while_on_data(self, x):
    h = self.lin(x)
    while h.abs().max() > 0.5:
        h = h * 0.7
    return self.out(h)


@data.forward()
def lists_of_numbers(self, x):
    weights = x.mean(1).softmax(0).tolist()
    return self.out(sum(w * row for w, row in zip(weights, self.lin(x))))


@data.forward()
def text_of_a_tensor(self, x):
    key = f"{x[0, 0]:.3f} {x.mean()}"
    return self.out(self.lin(x) * len(key.replace("-", "")) * (1 + key.count("-")))


@data.forward()
def asserts_on_data(self, x):
    h = self.lin(x)
    assert torch.isfinite(h).all(), "not finite"
    if torch.isnan(h).any():
        raise ValueError("nan")
    return self.out(h)


@data.forward(two)
def equal_and_close(self, x, y):
    if torch.equal(x, y) or torch.allclose(x, y):
        return self.out(x)
    return self.out(self.lin(x) - y)


@data.forward()
def mask_indexing(self, x):
    h = self.lin(x)
    return self.out(h) + h[x > 0].mean()


@data.forward()
def mask_assignment(self, x):
    h = self.lin(x)
    keep = h.sum(1) > 0
    result = torch.zeros_like(h)
    result[keep] = h[keep].tanh()
    return self.out(result)


@data.forward()
def nonzero_rows(self, x):
    h = self.lin(x)
    rows = torch.nonzero(x[:, 0] > 0).squeeze(1)
    return self.out(h.index_add(0, rows, h[rows]))


@data.forward()
def where_gives_indices(self, x):
    h = self.lin(x)
    rows, columns = torch.where(x > 1)
    return self.out(h) + h[rows, columns].sum()


@data.forward(tokens, parts={"emb": lambda: nn.Embedding(11, WIDTH)})
def unique_tokens(self, ids):
    values, back, counts = torch.unique(ids, return_inverse=True, return_counts=True)
    return self.out((self.lin(self.emb(values)) / counts[:, None])[back])


@data.forward()
def topk_with_k_of_data(self, x):
    h = self.lin(x)
    k = max(1, int((x[0] > 0).sum()))
    return self.out(h.scatter(1, h.topk(k, 1).indices, 0.0))


@data.forward(sequences)
def slice_up_to_a_length(self, x):
    n = int(x[:, :, 0].argmax(1).max()) + 1
    return self.out(self.lin(x[:, :n]).sum(1))


@data.forward(tokens, parts={"emb": lambda: nn.Embedding(11, WIDTH, padding_idx=0)})
def padding_cut_off(self, ids):
    longest = int((ids != 0).sum(1).max())
    ids = ids[:, : max(longest, 1)]
    mask = (ids != 0).unsqueeze(-1)
    return self.out((self.lin(self.emb(ids)) * mask).sum(1) / mask.sum(1).clamp(min=1))


@data.model()
class Experts(Small):
    """A mixture of experts that visits only those that were chosen."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(WIDTH, 4)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x):
        weights, chosen = self.gate(x).softmax(-1).topk(2, dim=-1)
        result = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows, slot = torch.where(chosen == i)
            if rows.numel() == 0:
                continue
            result.index_add_(0, rows, expert(x[rows]) * weights[rows, slot, None])
        return self.out(self.lin(result))


@data.model()
class ExpertsSorted(Small):
    """A mixture of experts by sorting rows and splitting at counts."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(WIDTH, 3)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x):
        scores = self.gate(x).softmax(-1)
        best, chosen = scores.max(-1)
        order = chosen.argsort(stable=True)
        counts = torch.bincount(chosen, minlength=3).tolist()
        done = [expert(part) for expert, part in zip(self.experts, x[order].split(counts))]
        return self.out(torch.cat(done)[order.argsort()] * best[:, None]), counts


@data.model()
class EarlyExit(Small):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x):
        for depth, layer in enumerate(self.layers):  # noqa: B007
            x = layer(x).tanh()
            if x.mean() > 0.05:
                break
        return self.out(x), depth


@data.model()
class DispatchByNumber(Small):
    def __init__(self):
        super().__init__()
        self.branches = nn.ModuleDict({str(i): nn.Linear(WIDTH, WIDTH) for i in range(WIDTH)})

    def forward(self, x):
        return self.out(self.branches[str(x.mean(0).argmax().item())](self.lin(x)))


@data.forward()
def sorted_in_python(self, x):
    h = self.lin(x)
    order = sorted(range(len(x)), key=lambda i: float(x[i, 0]))
    return self.out(torch.stack([h[i] for i in order]))


@data.forward(parts={"codes": lambda: nn.Parameter(torch.randn(5, WIDTH))})
def quantised_straight_through(self, x):
    h = self.lin(x)
    nearest = torch.cdist(h, self.codes).argmin(1)
    code = self.codes[nearest]
    return self.out(h + (code - h).detach()), F.mse_loss(code, h.detach()), torch.bincount(nearest, minlength=5)


@data.forward()
def masked_select_and_scatter(self, x):
    h = self.lin(x)
    picked = h.masked_select(x > 0)
    return self.out(h.masked_scatter(x > 0, picked.tanh())), picked.shape[0]


@data.forward()
def buckets(self, x):
    edges = torch.tensor([-1.0, 0.0, 1.0])
    h = self.lin(x) * torch.bucketize(x, edges)
    return self.out(h), torch.histc(x, 4, -2, 2), torch.searchsorted(edges, x[:, 0].contiguous())


@data.forward(lambda rows: (torch.randn(rows, STEPS, WIDTH), torch.randint(1, STEPS + 1, (rows,))))
def lengths_to_pieces(self, x, lengths):
    pieces = [row[:n].mean(0) for row, n in zip(self.lin(x), lengths.tolist())]
    return self.out(torch.stack(pieces))


@data.forward(lambda rows: (torch.randn(rows, STEPS, WIDTH), torch.randint(1, STEPS + 1, (rows,))))
def mask_of_lengths(self, x, lengths):
    mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]
    return self.out(self.lin(x[:, : mask.shape[1]])[mask])


@data.forward()
def truth_of_tensors(self, x):
    h = self.lin(x)
    first = x[0, 0] > 0 and x[0, 1] > 0
    return self.out(h if not first else h.sin()) * (1 if bool(x[0, 2] > 0) else 2)


@data.forward()
def tensor_as_python_index(self, x):
    h = self.lin(x)
    names = ["a", "bb", "ccc", "dddd", "eeeee", "ffffff"]
    return self.out(h * len(names[x[0].argmax()]) + list(range(WIDTH))[x[1].argmin()])


@data.forward()
def numbers_printed(self, x):
    h = self.lin(x)
    print("mean of the hidden units:", h.mean().item(), h[0])
    return self.out(h)


@data.forward()
def max_by_python(self, x):
    h = self.lin(x)
    return self.out(max(h, -h, key=lambda value: value.sum())) + min(x[0])


@data.forward(features)
def tensor_in_a_list(self, x):
    ids = list((x[:, 0] * 3).long().abs())
    return self.out(self.lin(x)) + sum(1 for i in ids if i in (0, 2))


@data.forward(features)
def slow_convergence(self, x):
    z, steps = torch.zeros_like(x), 0
    for steps in range(20):  # noqa: B007
        new = 0.3 * torch.tanh(self.lin(z)) + x
        if (new - z).norm() < 1e-2:
            break
        z = new
    return self.out(z), steps
