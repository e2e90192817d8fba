import torch


def tree_attention(query, key, value, tree, *, scale, softcap=None, sinks=None, how="auto"):
    g = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(g, 1)
    value = value.repeat_interleave(g, 1)
    t = tree[0, 0].to(query.device)
    end, pos = t[0], t[1]
    i = torch.arange(len(end))
    m = (i[None] <= i[:, None]) & (i[:, None] < end[None])
    if len(t) > 2:
        m &= (pos[:, None] - pos[None]) < t[2, 0]
    s = query @ key.mT * scale
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    s = s.masked_fill(~m, -torch.inf)
    if sinks is not None:
        s = torch.cat([s, sinks.view(1, -1, 1, 1).expand(1, -1, s.shape[2], 1)], -1)
    p = s.float().softmax(-1) if s.dtype != torch.float64 else s.softmax(-1)
    if sinks is not None:
        p = p[..., :-1]
    return p.to(value.dtype) @ value
