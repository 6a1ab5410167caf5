import sys

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from stagecut.errors import StagecutError
from stagecut.models import GPT, MLP, DigitsResNet, UNet, load_digits, next_token_loss


def n_parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def small_gpt(tied=True):
    return GPT(vocab=32, d_model=16, n_layers=2, n_heads=2, max_len=12, tied=tied)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # two threads on a busy machine took 30 times as long for these small models
    yield
    torch.set_num_threads(before)


EXAMPLES = {
    "resnet": (DigitsResNet, lambda rows: torch.randn(rows, 1, 8, 8)),
    "unet": (lambda: UNet(3, 4, width=4), lambda rows: torch.randn(rows, 3, 16, 16)),
    "gpt": (small_gpt, lambda rows: torch.randint(32, (rows, 10))),
    "mlp": (lambda: MLP(in_features=12, width=8, n_layers=5), lambda rows: torch.randn(rows, 12)),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_traced_model_computes_the_same_at_every_batch_size(name):
    build, batch = EXAMPLES[name]
    torch.manual_seed(0)
    module = build().eval()
    traced = fx.symbolic_trace(module)
    for rows in (1, 3, 8):
        x = batch(rows)
        assert torch.equal(traced(x), module(x))


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_parameter_gets_a_nonzero_gradient_in_the_first_step(name):
    build, batch = EXAMPLES[name]
    torch.manual_seed(0)
    module = build()
    module(batch(4)).square().sum().backward()
    assert [key for key, value in module.named_parameters() if value.grad is None or not value.grad.any()] == []


def test_resnet_has_the_size_it_states():
    assert 100_000 < n_parameters(DigitsResNet()) < 300_000


def test_resnet_learns_most_digits_in_one_epoch():
    torch.manual_seed(0)
    data = load_digits()
    module = DigitsResNet()
    optimizer = torch.optim.AdamW(module.parameters(), 1e-3)
    for rows in torch.randperm(len(data.x_train)).split(64):
        F.cross_entropy(module(data.x_train[rows]), data.y_train[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
    module.eval()
    with torch.no_grad():
        accuracy = (module(data.x_test).argmax(1) == data.y_test).double().mean().item()
    assert accuracy > 0.7


def test_unet_keeps_height_and_width_and_uses_its_first_level_last():
    module = UNet(in_channels=3, out_channels=5, width=4, depth=2)
    assert module(torch.randn(2, 3, 8, 12)).shape == (2, 5, 8, 12)
    nodes = list(fx.symbolic_trace(module).graph.nodes)
    stem = next(node for node in nodes if node.target == "stem.5")
    last_join = [node for node in nodes if node.target is torch.cat][-1]
    assert last_join in stem.users


def test_unet_treats_each_row_by_itself():
    torch.manual_seed(0)
    module = UNet(3, 4, width=4).train()
    x = torch.randn(4, 3, 16, 16)
    torch.testing.assert_close(torch.cat([module(x[:1]), module(x[1:])]), module(x))


def test_tied_gpt_has_one_matrix_for_both_embeddings():
    tied, untied = small_gpt(), small_gpt(tied=False)
    assert tied.head.weight is tied.tokens.weight
    assert untied.head.weight is not untied.tokens.weight
    assert n_parameters(untied) - n_parameters(tied) == 32 * 16


def test_gpt_output_depends_only_on_earlier_tokens():
    torch.manual_seed(0)
    module = small_gpt()
    tokens = torch.randint(32, (2, 10))
    changed = tokens.clone()
    changed[:, 6] = (changed[:, 6] + 1) % 32
    before, after = module(tokens), module(changed)
    assert torch.equal(before[:, :6], after[:, :6])
    assert not torch.equal(before[:, 6:], after[:, 6:])


def test_traced_gpt_takes_shorter_sequences():
    module = small_gpt()
    tokens = torch.randint(32, (2, 5))
    assert torch.equal(fx.symbolic_trace(module)(tokens), module(tokens))


def test_gpt_names_both_numbers_when_heads_do_not_divide_the_width():
    with pytest.raises(ValueError, match=r"d_model: 10, n_heads: 4"):
        GPT(vocab=8, d_model=10, n_layers=1, n_heads=4, max_len=4)


def test_next_token_loss_is_the_mean_over_tokens():
    logits = torch.zeros(2, 3, 8)
    target = torch.randint(8, (2, 3))
    torch.testing.assert_close(next_token_loss(logits, target), torch.tensor(8.0).log())


def test_mlp_has_as_many_hidden_layers_as_asked():
    module = MLP(in_features=12, width=8, n_layers=7, out_features=3)
    assert sum(isinstance(part, torch.nn.Linear) for part in module.modules()) == 7 + 1
    assert module(torch.randn(2, 12)).shape == (2, 3)


def test_digits_split_is_complete_normalised_and_repeatable():
    data, again, other = load_digits(), load_digits(), load_digits(seed=1)
    assert data.x_train.shape == (1438, 1, 8, 8)
    assert data.x_test.shape == (359, 1, 8, 8)
    assert data.x_train.dtype == torch.float32
    assert data.y_train.dtype == torch.int64
    labels = torch.cat([data.y_train, data.y_test])
    assert labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    torch.testing.assert_close(data.x_train.mean().item(), 0.0, atol=1e-5, rtol=0)
    torch.testing.assert_close(data.x_train.std().item(), 1.0, atol=1e-5, rtol=0)
    assert torch.equal(data.x_test, again.x_test)
    assert not torch.equal(data.y_test, other.y_test)


def test_digits_share_outside_0_to_1_is_refused():
    with pytest.raises(StagecutError, match=r"got 1\.5"):
        load_digits(test_share=1.5)


def test_digits_without_scikit_learn_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(StagecutError) as caught:
        load_digits()
    assert caught.value.hint == "pip install scikit-learn"
