"""Pairing: which tensors LoFT takes, which it leaves to AdamW, and which it refuses by name."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

import loft_kernels as lk

peft = pytest.importorskip("peft", reason="PEFT is optional; its zoo is tested where it is there")
transformers = pytest.importorskip("transformers")


def gpt2(**options) -> nn.Module:
    """A two-layer GPT-2 (Conv1D layers) with adapters on its projections."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=48,
        n_positions=16,
        n_embd=16,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        tie_word_embeddings=options.pop("tie", True),
    )
    base = {"r": 4, "lora_alpha": 8, "target_modules": ["c_attn", "c_proj", "c_fc"]}
    if "target_parameters" not in options:
        base["fan_in_fan_out"] = True
    return peft.get_peft_model(
        transformers.GPT2LMHeadModel(config), peft.LoraConfig(**{**base, **options})
    )


def pair_table(module: nn.Module) -> dict[str, tuple[int, float]]:
    """Name, rank and scaling of every pair found."""
    found = lk.find_adapters(module)
    return {p.name: (p.lora_A.shape[0], p.scaling.read()) for p in found.pairs}


def train(module: nn.Module, opt: torch.optim.Optimizer, steps: int = 2) -> list[float]:
    """Take steps on one random batch."""
    x = torch.randint(0, 48, (2, 16), generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(steps):
        loss = module(input_ids=x, labels=x).loss
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    return losses


def moved_parameters(module: nn.Module, opt: torch.optim.Optimizer, steps: int = 2) -> set[str]:
    """Names of the parameters that some steps change."""
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    train(module, opt, steps)
    return {n for n, p in module.named_parameters() if not torch.equal(before[n], p)}


@pytest.mark.filterwarnings("ignore::UserWarning")
class TestPeft:
    def test_every_layer_is_paired_with_its_own_rank_and_scaling(self):
        model = gpt2(
            rank_pattern={"attn.c_attn": 2, "c_fc": 7},
            alpha_pattern={"attn.c_attn": 32, "c_fc": 1},
        )
        table = pair_table(model)
        assert len(table) == 8
        expected = {"attn.c_attn": (2, 16.0), "attn.c_proj": (4, 2.0), "c_fc": (7, 1 / 7)}
        for suffix, value in expected.items():
            found = [v for n, v in table.items() if n.endswith(f"{suffix}[default]")]
            assert found == [value, value], suffix

    def test_rslora_scales_with_the_square_root_of_the_rank(self):
        assert {s for _, s in pair_table(gpt2(use_rslora=True)).values()} == {4.0}

    def test_scaling_is_read_at_every_step(self):
        model = gpt2()
        opt = lk.LoFTAdamW(model)
        for module in model.modules():
            if hasattr(module, "set_scale"):
                module.set_scale("default", 3.0)
        assert {slot.scaling.read() for slot in opt._slots} == {6.0}

    def test_conv1d_and_both_phases_move_every_factor(self):
        model = gpt2()
        moved = moved_parameters(model, lk.LoFTAdamW(model, lr=1e-2))
        assert {n for n in moved if "lora_B" in n} == {
            n for n, _ in model.named_parameters() if "lora_B" in n
        }
        assert {n for n in moved if "lora_A" in n} == {
            n for n, _ in model.named_parameters() if "lora_A" in n
        }

    @pytest.mark.parametrize(
        ("options", "plain"),
        [
            ({"use_dora": True}, "lora_magnitude_vector"),
            ({"lora_bias": True}, "lora_B.default.bias"),
            ({"modules_to_save": ["ln_f"]}, "ln_f.modules_to_save"),
            ({"bias": "all"}, "c_attn.base_layer.bias"),
            ({"trainable_token_indices": [1, 2]}, "trainable_tokens_delta"),
        ],
        ids=["dora", "lora-bias", "modules-to-save", "bias-all", "trainable-tokens"],
    )
    def test_other_trainable_tensors_take_adamw(self, options, plain):
        model = gpt2(**options)
        opt = lk.LoFTAdamW(model, lr=1e-2)
        assert len(opt._slots) == 8
        names = opt.param_groups[1]["param_names"]
        assert any(plain in name for name in names)
        moved = moved_parameters(model, opt)
        assert set(names) <= moved
        for p in opt.param_groups[1]["params"]:
            assert set(opt.state[p]) == {"step", "exp_avg", "exp_avg_sq"}

    def test_each_adapter_of_a_layer_is_its_own_pair(self):
        model = gpt2()
        model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["c_fc"]))
        assert all(n.endswith("[default]") for n in pair_table(model))
        model.set_adapter("second")
        assert {n.rsplit("[", 1)[1] for n in pair_table(model)} == {"second]"}
        model.base_model.set_adapter(["default", "second"])
        assert len(pair_table(model)) == 10

    def test_embedding_adapter_is_a_pair(self):
        model = gpt2(target_modules=["wte", "c_fc"])
        opt = lk.LoFTAdamW(model)
        assert len(opt._slots) == 3
        assert len(opt.param_groups) == 1
        # PEFT starts embeddings from A = 0, so that B cannot move before A has.
        moved = moved_parameters(model, opt, steps=3)
        assert {n.split(".")[-2] for n in moved if "wte" in n} == {
            "lora_embedding_A",
            "lora_embedding_B",
        }

    def test_convolution_adapter_is_a_pair(self):
        net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.LazyLinear(3))
        net(torch.zeros(1, 2, 8, 8))
        model = peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["0", "2"]))
        assert len(lk.LoFTAdamW(model)._slots) == 2

    def test_variants_with_another_product_are_named(self):
        model = gpt2(init_lora_weights="mica")
        with pytest.raises(ValueError, match="MiCALinearVariant"):
            lk.LoFTAdamW(model)

    def test_adapter_that_is_not_trainable_is_an_error(self):
        model = gpt2()
        model.requires_grad_(False)
        with pytest.raises(ValueError, match=r"none is trainable.*is_trainable=True"):
            lk.LoFTAdamW(model)

    def test_experts_interleaved_in_one_tensor_are_refused(self):
        class Experts(nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = nn.Parameter(torch.randn(4, 6, 6))

            def forward(self, x):
                return torch.einsum("bi,eij->bj", x, self.weight)

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.experts = Experts()
                self.head = nn.Linear(6, 6)

            def forward(self, x):
                return self.head(self.experts(x))

        config = peft.LoraConfig(r=2, target_parameters=["experts.weight"], target_modules=["head"])
        model = peft.get_peft_model(Net(), config)
        with pytest.raises(NotImplementedError, match=r"experts.*4 experts.*target_modules"):
            lk.LoFTAdamW(model)
        with pytest.warns(UserWarning, match="4 experts"):
            opt = lk.LoFTAdamW(model, on_unsupported="adamw")
        assert len(opt._slots) == 1
        assert len(opt.param_groups[1]["params"]) == 2

    def test_tied_adapters_over_shared_storage_are_refused(self):
        layer = nn.Module()
        layer.one, layer.two = nn.Module(), nn.Module()
        shared = torch.randn(8, 4)
        layer.one.lora_B, layer.one.lora_A = nn.Parameter(shared), nn.Parameter(torch.randn(4, 6))
        layer.two.lora_B = nn.Parameter(torch.randn(6, 8))
        layer.two.lora_A = nn.Parameter(shared.data.view(-1)[:32].view(8, 4))
        with pytest.raises(ValueError, match=r"one\.lora_B.*two\.lora_A.*share memory.*Untie"):
            lk.LoFTAdamW(layer)

    def test_one_summary_line_is_logged(self, caplog):
        with caplog.at_level(logging.INFO, logger="loft_kernels"):
            lk.LoFTAdamW(gpt2(use_dora=True))
        assert [r.getMessage() for r in caplog.records] == [
            "LoFT: 8 LoRA pairs (ranks [4]), 8 parameters on plain AdamW"
        ]

    def test_create_loft_optimizer_is_the_factory_of_peft_style(self):
        model = gpt2()
        opt = lk.create_loft_optimizer(model, lr=1e-2, eps=1e-7, max_grad_norm=1.0)
        assert isinstance(opt, lk.LoFTAdamW)
        assert opt.param_groups[0]["eps"] == 1e-7
        with pytest.raises(TypeError, match="needs a module"):
            lk.create_loft_optimizer([nn.Parameter(torch.zeros(2))], lr=1e-2)

    def test_wrapped_models_are_paired_too(self):
        model = gpt2()
        assert len(pair_table(torch.compile(model))) == 8
        wrapper = nn.Module()
        wrapper.module = model
        assert len(lk.LoFTAdamW(wrapper)._slots) == 8

    def test_trained_weights_reach_merge_and_save(self, tmp_path):
        model = gpt2()
        opt = lk.LoFTAdamW(model, lr=1e-2)
        train(model, opt)
        x = torch.arange(16)[None]
        trained = model(input_ids=x).logits
        model.save_pretrained(tmp_path)
        fresh = gpt2().unload()
        loaded = peft.PeftModel.from_pretrained(fresh, tmp_path)
        torch.testing.assert_close(loaded(input_ids=x).logits, trained)
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=x).logits, trained, rtol=1e-4, atol=1e-5)


class Layer(nn.Module):
    """A LoRA layer of somebody's own, in each of the forms that are recognised."""

    def __init__(self, form: str) -> None:
        super().__init__()
        a, b = torch.randn(3, 7), torch.randn(5, 3)
        if form == "parameters":
            self.lora_A, self.lora_B = nn.Parameter(a), nn.Parameter(b)
        elif form == "linears":
            self.lora_A, self.lora_B = nn.Linear(7, 3, bias=False), nn.Linear(3, 5, bias=False)
        elif form == "parameter-dicts":
            self.lora_A = nn.ParameterDict({"x": nn.Parameter(a)})
            self.lora_B = nn.ParameterDict({"x": nn.Parameter(b)})
        else:
            self.lora_A = nn.ModuleDict({"x": nn.Linear(7, 3, bias=False)})
            self.lora_B = nn.ModuleDict({"x": nn.Linear(3, 5, bias=False)})


@pytest.mark.parametrize("form", ["parameters", "linears", "parameter-dicts", "module-dicts"])
@pytest.mark.parametrize("scaling", [None, 2.0, {"x": 0.5}], ids=["none", "number", "dict"])
def test_own_layers_are_recognised(form, scaling):
    layer = Layer(form)
    if scaling is not None:
        layer.scaling = scaling
    found = lk.find_adapters(nn.ModuleDict({"proj": layer}))
    (pair,) = found.pairs
    keyed = isinstance(scaling, dict) and "dicts" in form
    expected = 0.5 if keyed else 1.0 if scaling is None or isinstance(scaling, dict) else 2.0
    assert pair.scaling.read() == expected
    assert (pair.lora_B.shape, pair.lora_A.shape) == ((5, 3), (3, 7))
    assert pair.name_B.startswith("proj.lora_B")


class TestNames:
    def named(self) -> list[tuple[str, nn.Parameter]]:
        module = nn.ModuleDict({"q": Layer("parameters"), "v": Layer("linears")})
        return [*module.named_parameters(), ("head.bias", nn.Parameter(torch.zeros(3)))]

    def test_named_parameters_pair_with_a_scaling(self):
        opt = lk.LoFTAdamW([{"params": self.named(), "scaling": 2.0}])
        assert {s.name: s.scaling.read() for s in opt._slots} == {"q": 2.0, "v": 2.0}

    def test_scaling_per_layer(self):
        opt = lk.LoFTAdamW([{"params": self.named(), "scaling": {"q": 2.0, "v": 0.5}}])
        assert {s.name: s.scaling.read() for s in opt._slots} == {"q": 2.0, "v": 0.5}

    def test_names_without_scaling_are_an_error_and_not_adamw(self):
        with pytest.raises(ValueError, match=r"q\.lora_B and q\.lora_A.*alpha/r.*Pass the model"):
            lk.LoFTAdamW(self.named())

    def test_a_name_without_partner_is_an_error(self):
        named = [(n, p) for n, p in self.named() if n != "v.lora_B.weight"]
        with pytest.raises(ValueError, match=r"v\.lora_A\.weight .* no partner v\.lora_B\.weight"):
            lk.LoFTAdamW([{"params": named, "scaling": 1.0}])

    def test_factors_in_two_groups_may_differ_in_lr_only(self):
        named = self.named()
        side = {s: [(n, p) for n, p in named if f"lora_{s}" in n] for s in "AB"}
        groups = [
            {"params": side["A"], "scaling": 1.0, "lr": 1e-4},
            {"params": side["B"], "scaling": 1.0, "lr": 1e-3},
        ]
        opt = lk.LoFTAdamW([dict(g) for g in groups])
        assert [(s.b[0], s.a[0]) for s in opt._slots] == [(1, 0), (1, 0)]
        groups[0]["betas"] = (0.5, 0.9)
        with pytest.raises(ValueError, match="only lr may differ"):
            lk.LoFTAdamW([dict(g) for g in groups])

    def test_group_added_later_is_paired(self):
        named = self.named()
        opt = lk.LoFTAdamW([{"params": named[:2], "scaling": 1.0}])
        opt.add_param_group({"params": named[2:], "scaling": 4.0})
        assert {s.name: s.scaling.read() for s in opt._slots} == {"q": 1.0, "v": 4.0}


def test_param_groups_carry_the_pairing_and_options():
    model = nn.ModuleDict({"q": Layer("parameters"), "head": nn.Linear(2, 2)})
    groups = lk.loft_param_groups(model, lr=1e-2, weight_decay=0.1)
    groups[1]["weight_decay"] = 0.0
    opt = lk.LoFTAdamW(groups, betas=(0.8, 0.9))
    assert len(opt._slots) == 1
    assert [g["weight_decay"] for g in opt.param_groups] == [0.1, 0.0]
    assert [g["lr"] for g in opt.param_groups] == [1e-2, 1e-2]
    assert all("lora_pairs" not in g for g in opt.param_groups)
    with pytest.raises(TypeError, match="unknown group options"):
        lk.loft_param_groups(model, learning_rate=1e-2)


def test_no_empty_group_is_made():
    groups = lk.loft_param_groups(nn.ModuleDict({"q": Layer("parameters")}))
    assert [len(g["params"]) for g in groups] == [2]


def test_module_without_pairs_is_an_error_that_names_what_was_looked_for():
    with pytest.raises(ValueError, match=r"no trainable LoRA pair in Linear.*lora_A and lora_B"):
        lk.LoFTAdamW(nn.Linear(3, 3))


def test_report_names_the_backend_and_why():
    report = lk.report()
    assert report.chosen in report.available
    assert report.chosen in str(report)
    assert report.reason in str(report)
