"""Handwritten digits (scikit-learn's, 1797 of 8 x 8 pixels) on as many devices as join.

shoal train --devices 3 examples/digits.py
"""

import torch
from sklearn.datasets import load_digits
from torch.utils.data import TensorDataset

import shoal.pytorch as sp

pixels, labels = load_digits(return_X_y=True)
x, y = torch.tensor(pixels / 16.0, dtype=torch.float32), torch.tensor(labels)
train, held_out = TensorDataset(x[:1500], y[:1500]), (x[1500:], y[1500:])

torch.manual_seed(0)
model = torch.nn.Sequential(
    torch.nn.Unflatten(1, (1, 8, 8)),
    torch.nn.Conv2d(1, 16, 3, padding=1),
    torch.nn.BatchNorm2d(16),
    torch.nn.ReLU(),
    torch.nn.Flatten(),
    torch.nn.Dropout(0.1),
    torch.nn.Linear(1024, 10),
)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
loss_of = torch.nn.CrossEntropyLoss(reduction="sum")

run = sp.join("digits", model=model, optimizer=optimizer, dataset=train, global_batch=100, passes=6)
for batch in run:
    loss = loss_of(model(batch.x), batch.y)
    run.step(loss, clip_norm=1.0)

model.eval()
with torch.no_grad():
    share = (model(held_out[0]).argmax(1) == held_out[1]).float().mean()
print(f"{share:.1%} of {len(held_out[1])} digits that it has not seen are right")
