"""A small GPT that learns the text of Python's own manual, which every Python carries (pydoc_data.topics).

shoal train --devices 2 examples/nanogpt_pydoc.py
"""

import os
from pydoc_data.topics import topics

import torch
from torch.nn import functional as F

import shoal.pytorch as sp

CONTEXT, WIDTH, HEADS, LAYERS = 64, 96, 4, 3
text = "\n".join(topics[name] for name in sorted(topics)).encode()
data = torch.tensor(list(text), dtype=torch.long)


class Windows(torch.utils.data.Dataset):
    def __len__(self):
        return (len(data) - 1) // CONTEXT

    def __getitem__(self, index):
        first = index * CONTEXT
        return data[first : first + CONTEXT], data[first + 1 : first + CONTEXT + 1]


class GPT(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = torch.nn.Embedding(256, WIDTH)
        self.places = torch.nn.Embedding(CONTEXT, WIDTH)
        layer = {"dim_feedforward": 4 * WIDTH, "dropout": 0.0, "activation": F.gelu, "batch_first": True, "norm_first": True}
        self.blocks = torch.nn.ModuleList(torch.nn.TransformerEncoderLayer(WIDTH, HEADS, **layer) for _ in range(LAYERS))
        self.norm = torch.nn.LayerNorm(WIDTH)
        self.head = torch.nn.Linear(WIDTH, 256, bias=False)

    def forward(self, x):
        mask = torch.nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        h = self.tokens(x) + self.places(torch.arange(x.shape[1]))
        for block in self.blocks:
            h = block(h, src_mask=mask, is_causal=True)
        return self.head(self.norm(h))


torch.manual_seed(0)
model = GPT()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
steps = int(os.environ.get("STEPS", "300"))
warm = lambda step: 1e-3 * min(1.0, (step + 1) / 20)  # noqa: E731

run = sp.join("pydoc", model=model, optimizer=optimizer, dataset=Windows(), global_batch=64, steps=steps, learning_rate=warm)
for batch in run:
    logits = model(batch.x)
    loss = F.cross_entropy(logits.reshape(-1, 256), batch.y.reshape(-1), reduction="sum") / CONTEXT
    run.step(loss, clip_norm=1.0)

model.eval()
x = torch.tensor([list(b"The import statement ")], dtype=torch.long)
with torch.no_grad():
    for _ in range(200):
        x = torch.cat([x, model(x[:, -CONTEXT:])[:, -1].argmax(-1, keepdim=True)], 1)
print(bytes(x[0].tolist()).decode(errors="replace"))
