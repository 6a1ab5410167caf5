"""The code of the README, word for word, with the data that a user would have."""

SETUP = """
import torch
import torch.nn.functional as F
torch.manual_seed(0)
layers = [torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3)]
model = torch.nn.Sequential(*layers)
data = torch.utils.data.TensorDataset(torch.randn(22, 8), torch.randint(3, (22,)))
loader = torch.utils.data.DataLoader(data, batch_size=8)
"""

CODE = """
import stagecut

pm  = stagecut.compile(model, devices=[0, 1], loss_fn=F.cross_entropy)
opt = torch.optim.AdamW(pm.parameters(), 3e-4)
for x, y in loader:                       # the last, short batch is fine
    loss = pm.step(x, target=y).loss      # pipelined forward + backward; gradients are in .grad
    opt.step(); opt.zero_grad()
"""

TAIL = """
print(f"loss {loss.item():.6f}")
"""

SCRIPT = SETUP + CODE + TAIL

PLAIN = (
    SETUP
    + """
opt = torch.optim.AdamW(model.parameters(), 3e-4)
for x, y in loader:
    loss = F.cross_entropy(model(x), y); loss.backward()
    opt.step(); opt.zero_grad()
"""
    + TAIL
)
