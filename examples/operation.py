"""The operation in ten lines: two softmax maps, one subtracted from the other, times the values."""

import torch

from diffattn import diff_attention

q1, k1, q2, k2, v = (torch.randn(1, 16, 4, 32) for _ in range(5))  # batch, tokens, heads, width
lam = torch.tensor(0.8)
causal = torch.ones(16, 16).tril() == 0  # True where a key lies after the query
scores = (torch.einsum("bthd,bshd->bhts", q, k) / 32**0.5 for q, k in ((q1, k1), (q2, k2)))
map_pos, map_neg = (torch.softmax(each.masked_fill(causal, -torch.inf), dim=-1) for each in scores)
by_hand = torch.einsum("bhts,bshd->bthd", map_pos - lam * map_neg, v)
fused = diff_attention(q1, k1, q2, k2, v, lam)
print("largest difference from the definition:", (fused - by_hand).abs().max().item())
