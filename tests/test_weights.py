"""Published forms open to the bit; damaged and hostile files cost one line and run nothing."""

import json
import os
import pickle
import random
import struct
import zipfile

import pytest
import torch
from conftest import randomise
from published import write_dream, write_hub, write_lightning

import weights
from model import DREAM_SIZES, DiT, DiTConfig, Dream, DreamConfig
from softmask import SoftMask

SIZES = dict(vocab_size=40, block_size=1024, n_layers=2, n_heads=1, width=64, cond_dim=16)


@pytest.fixture(autouse=True)
def small_vocabulary(monkeypatch):
    monkeypatch.setattr(weights, "GPT2_IDS", SIZES["vocab_size"])


@pytest.fixture(scope="module")
def networks():
    """Two different random networks: raw and averaged weights."""
    torch.manual_seed(1)
    pair = [DiT(DiTConfig(**SIZES)).eval() for _ in range(2)]
    for model in pair:
        randomise(model)
    return pair


def logits(model):
    tokens = torch.arange(39)[None]
    return model.logits(model.eval().hidden(model.embed(tokens), torch.tensor([0.5]))[0])


def load(path, ema=False):
    return weights.build_model(weights.load_checkpoint(str(path), "--ckpt"), ema)


@pytest.fixture
def folder(tmp_path, networks):
    softmask = SoftMask(3, omega_s=0.25, lower_bound=-2.0)
    state = {
        "config": networks[0].config.to_dict(),
        "model": networks[0].state_dict(),
        "ema": [p.detach() for p in networks[1].parameters()],
        "softmask": {"k": 3, "state": softmask.state_dict()},
        "step": 7,
        **dict.fromkeys(("updates", "optimizer", "generator", "rng", "tokenizer", "args", "text")),
    }
    weights.save_checkpoint(tmp_path, state, softmask)
    return tmp_path


# Round trips


def test_our_raw_and_averaged_weights_come_back_to_the_bit(folder, networks):
    for path in (folder, folder / "ckpt.pt"):
        assert torch.equal(logits(load(path)), logits(networks[0]))
        assert torch.equal(logits(load(path, ema=True)), logits(networks[1]))


def test_our_checkpoint_opens_with_weights_only(folder):
    assert torch.load(folder / "ckpt.pt", weights_only=True)["step"] == 7


def test_omegas_come_back_and_stand_beside_the_checkpoint(folder):
    softmask = weights.build_softmask(weights.load_checkpoint(str(folder), "--ckpt"))
    want = {"omega_s": 0.25, "omega_a": 5.0, "omega_b": -1.0}
    assert softmask.k == 3 and softmask.omegas() == pytest.approx(want)
    beside = json.loads((folder / "softmask.json").read_text())
    assert beside == {"step": 7, "k": 3, **softmask.omegas()}


def test_lightning_checkpoint_opens_without_its_libraries(tmp_path, networks):
    """The name of the file says nothing: content decides."""
    file = tmp_path / "weights.bin"
    write_lightning(file, *networks, adam=True)
    assert torch.equal(logits(load(file)), logits(networks[0]))
    assert torch.equal(logits(load(file, ema=True)), logits(networks[1]))
    state = weights.load_checkpoint(str(file), "--init")
    assert state["tokenizer"] == {"name": "gpt2"} and state["softmask"] is None


def test_ema_order_is_that_of_the_published_list(tmp_path, networks):
    """Every parameter of the average holds its own place in the published order."""
    model = DiT(DiTConfig(**SIZES))
    for place, (_, name) in enumerate(weights.mdlm_names(2)):
        model.get_parameter(name).data.fill_(place)
    write_lightning(tmp_path / "mdlm.ckpt", networks[0], model)
    loaded = load(tmp_path / "mdlm.ckpt", ema=True)
    for name, p in loaded.named_parameters():
        assert torch.equal(p, model.get_parameter(name)), name


def test_full_size_network_has_the_published_130_tensors():
    names = weights.mdlm_names(12)
    assert len(names) == len({ours for _, ours in names}) == 130
    assert names[0][0] == "vocab_embed.embedding"
    assert [n for n, _ in names[-5:]] == [
        "output_layer.norm_final.weight", "output_layer.linear.weight", "output_layer.linear.bias",
        "output_layer.adaLN_modulation.weight", "output_layer.adaLN_modulation.bias",
    ]  # fmt: skip


def test_released_soft_masking_checkpoint_brings_its_omegas(tmp_path, networks):
    raw = {"raw_scale": 0.4, "raw_steep": 2.0, "raw_centre_neg": 1.0, "raw_temperature": 0.5}
    write_lightning(tmp_path / "sm.ckpt", *networks, omegas=raw)
    omegas = weights.build_softmask(
        weights.load_checkpoint(str(tmp_path / "sm.ckpt"), "-")
    ).omegas()
    softplus = torch.nn.functional.softplus
    assert omegas["omega_s"] == pytest.approx(torch.sigmoid(torch.tensor(0.4)).item())
    assert omegas["omega_a"] == pytest.approx(softplus(torch.tensor(2.0)).item() + 1e-6)
    assert omegas["omega_b"] == pytest.approx(-softplus(torch.tensor(1.0)).item() - 1e-6)


@pytest.mark.parametrize("shards", [1, 3])
def test_hub_folder_opens_sharded_or_not(tmp_path, shards):
    torch.manual_seed(2)
    model = DiT(
        DiTConfig(**(SIZES | dict(n_heads=4, block_size=50, time_conditioning=True)))
    ).eval()
    randomise(model)
    write_hub(tmp_path / "hub", model, shards)
    loaded = load(tmp_path / "hub")
    assert loaded.config == model.config and torch.equal(logits(loaded), logits(model))
    assert torch.equal(logits(load(tmp_path / "hub", ema=True)), logits(model))
    if shards == 1:
        assert torch.equal(logits(load(tmp_path / "hub" / "model.safetensors")), logits(model))


def test_half_precision_weights_are_widened(tmp_path, networks):
    half = DiT(networks[0].config)
    half.load_state_dict(networks[0].state_dict())
    write_hub(tmp_path / "hub", half.bfloat16())
    p = load(tmp_path / "hub").head.weight
    assert p.dtype == torch.float32 and torch.equal(p, half.head.weight.float())


def test_hub_id_without_network_or_cache_says_what_to_fetch(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("mdlm-owt", "kuleshov-group/mdlm-owt"):
        with pytest.raises(FileNotFoundError, match=r"kuleshov-group/mdlm-owt.*model\.safetensors"):
            weights.load_checkpoint(name, "--init")


# Damage


@pytest.fixture(params=["ours", "lightning", "hub"])
def file(request, tmp_path, networks, folder):
    """One whole file of each form."""
    if request.param == "ours":
        return folder / "ckpt.pt"
    if request.param == "lightning":
        write_lightning(tmp_path / "mdlm.ckpt", *networks)
        return tmp_path / "mdlm.ckpt"
    write_hub(tmp_path / "hub", networks[0])
    return tmp_path / "hub" / "model.safetensors"


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.01, 0.5, 0.99])
def test_truncated_file_is_refused(file, share):
    os.truncate(file, int(file.stat().st_size * share))
    with pytest.raises(ValueError, match=r"--ckpt .*no checkpoint that can be read"):
        load(file)


def test_mutated_files_load_or_are_refused(file):
    """Bytes of the structure, where damage is most varied, and of the whole file."""
    whole = file.read_bytes()
    rng = random.Random(0)
    refused = 0
    for attempt in range(150):
        broken = bytearray(whole)
        reach = len(broken) if attempt % 2 else 4000
        from_end = attempt % 4 == 0 and file.suffix != ".safetensors"
        for _ in range(rng.choice([1, 3, 30])):
            at = rng.randrange(reach)
            broken[len(broken) - 1 - at if from_end else at] = rng.randrange(256)
        file.write_bytes(broken)
        try:
            load(file)
        except (ValueError, FileNotFoundError) as error:
            assert str(file.name) in str(error) or "parts do not fit" in str(error)
            refused += 1
    assert refused > 60


def test_missing_places_are_named(tmp_path):
    for path, message in (
        (tmp_path / "nowhere.pt", r"--init .*nowhere\.pt: no such file"),
        (tmp_path, "neither ckpt.pt nor config.json"),
    ):
        with pytest.raises(FileNotFoundError, match=message):
            weights.load_checkpoint(str(path), "--init")


def test_missing_shard_and_lying_index_are_named(tmp_path, networks):
    write_hub(tmp_path / "hub", networks[0], shards=3)
    index = tmp_path / "hub" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["backbone.extra"] = "model-0.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"backbone\.extra, which no shard holds"):
        load(tmp_path / "hub")
    (tmp_path / "hub" / "model-1.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model-1\.safetensors is missing"):
        load(tmp_path / "hub")


def test_header_longer_than_the_file_is_refused(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 2**40) + b"{}")
    with pytest.raises(ValueError, match="no checkpoint that can be read"):
        load(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("backbone.blocks.1.mlp.0.bias"), r"missing blocks\.1\.mlp\.0\.bias"),
        (lambda w: w.update({"backbone.extra": torch.zeros(1)}), "unexpected extra"),
        (
            lambda w: w.update({"backbone.blocks.0.attn_out.weight": torch.zeros(3, 64)}),
            r"attn_out\.weight of shape \(3, 64\), where \(64, 64\) fits",
        ),
        (
            lambda w: w.update({"backbone.output_layer.norm_final.weight": torch.zeros(64).long()}),
            "torch.int64, not weights",
        ),
        (lambda w: w.clear(), "looked for backbone.vocab_embed.embedding"),
    ],
)
def test_unfit_network_names_the_key(tmp_path, networks, monkeypatch, change, message):
    import published

    real = published.published_keys

    def changed(model):
        keys = real(model)
        change(keys)
        return keys

    monkeypatch.setattr(published, "published_keys", changed)
    write_lightning(tmp_path / "mdlm.ckpt", networks[0], None)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "mdlm.ckpt")


def test_short_ema_list_and_other_vocabulary_are_refused(tmp_path, networks, monkeypatch):
    write_lightning(tmp_path / "mdlm.ckpt", *networks)
    monkeypatch.setattr(weights, "GPT2_IDS", 50_258)
    with pytest.raises(ValueError, match="a vocabulary of 40"):
        load(tmp_path / "mdlm.ckpt")


def test_foreign_files_say_what_was_looked_for(tmp_path):
    file = tmp_path / "ckpt.pt"
    for content in ({"weights": 3}, [1, 2]):
        torch.save(content, file)
        with pytest.raises(ValueError, match=r'looked for a "state_dict" \(MDLM\) or "format"'):
            load(file)
    with zipfile.ZipFile(file, "w") as z:
        z.writestr("hello", "world")
    with pytest.raises(ValueError, match=r"without PyTorch's data\.pkl"):
        load(file)


# Malice


class Payload:
    """Unpickled by an ordinary unpickler, it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (os.mkdir, (self.path,))


class Setter(Payload):
    def __reduce__(self):
        return (eval, (f"__import__('os').mkdir({self.path!r})",))


@pytest.mark.parametrize("kind", [Payload, Setter])
def test_code_in_a_file_is_never_run(tmp_path, networks, kind):
    trap, file = tmp_path / "sprung", tmp_path / "ckpt.pt"
    for content in (
        {"format": weights.FORMAT, "x": kind(trap)},
        {"state_dict": kind(trap)},
        kind(trap),
    ):
        torch.save(content, file)
        with pytest.raises(ValueError, match="--ckpt"):
            load(file)
    file.write_bytes(pickle.dumps(kind(trap)))  # no zip at all
    with pytest.raises(ValueError, match="--ckpt"):
        load(file)
    assert not trap.exists()
    with zipfile.ZipFile(file, "w") as z:  # what torch.load would take for a compiled program
        z.writestr("ckpt/data.pkl", pickle.dumps(kind(trap)))
        z.writestr("ckpt/constants.pkl", pickle.dumps(kind(trap)))
    with pytest.raises(ValueError, match="--ckpt"):
        load(file)
    assert not trap.exists()
    pickle.loads(pickle.dumps(kind(trap)))
    assert trap.exists(), "the payload works where it is let"


def test_payload_beside_real_weights_is_ignored(tmp_path, networks, monkeypatch):
    trap = tmp_path / "sprung"
    real = torch.save
    monkeypatch.setattr(torch, "save", lambda s, p: real(s | {"callbacks": Payload(trap)}, p))
    write_lightning(tmp_path / "mdlm.ckpt", *networks)
    assert torch.equal(logits(load(tmp_path / "mdlm.ckpt")), logits(networks[0]))
    assert not trap.exists()


def test_tensor_beyond_its_storage_is_refused(tmp_path):
    for offset, size, stride in (
        (0, (9,), (1,)),
        (5, (4,), (1,)),
        (-1, (2,), (1,)),
        (0, (3,), (4,)),
    ):
        with pytest.raises(ValueError, match="beyond its storage"):
            weights._rebuild_tensor(torch.zeros(8), offset, size, stride)
    assert weights._rebuild_tensor(torch.arange(8), 1, (2, 3), (3, 1)).tolist() == [
        [1, 2, 3],
        [4, 5, 6],
    ]


# Dream's folders


@pytest.fixture(scope="module")
def dream():
    torch.manual_seed(2)
    model = Dream(DreamConfig(**DREAM_SIZES["dream-tiny"])).eval()
    randomise(model)
    return model


@torch.no_grad()
def dream_logits(model):
    tokens = torch.arange(30)[None]
    return model.logits(model.hidden(model.embed(tokens))[0])


def qwen2_of(dream):
    transformers = pytest.importorskip("transformers")
    c = dream.config
    config = transformers.Qwen2Config(
        vocab_size=c.vocab_size, hidden_size=c.width, intermediate_size=c.mlp_width,
        num_hidden_layers=c.n_layers, num_attention_heads=c.n_heads,
        num_key_value_heads=c.n_kv_heads, rope_theta=c.rope_base, rms_norm_eps=c.rms_eps,
        tie_word_embeddings=False, mask_token_id=c.mask_id,
    )  # fmt: skip
    theirs = transformers.Qwen2ForCausalLM(config)
    theirs.load_state_dict(
        {weights.published_name(n): p.detach() for n, p in dream.named_parameters()}
    )
    return theirs


@pytest.mark.parametrize("size", ["10GB", "200KB"])
def test_a_folder_that_transformers_saved_opens_to_the_same_logits(tmp_path, dream, size):
    theirs = qwen2_of(dream)
    theirs.save_pretrained(tmp_path, max_shard_size=size)
    shards = len(list(tmp_path.glob("*.safetensors")))
    assert shards > 2 if size == "200KB" else shards == 1
    assert torch.equal(dream_logits(load(tmp_path)), dream_logits(dream))


def test_names_of_dream_files_go_both_ways(dream):
    for name, _ in dream.named_parameters():
        assert weights.dream_name(weights.published_name(name)) == name
    assert weights.published_name("layers.1.q_proj.bias") == "model.layers.1.self_attn.q_proj.bias"


def test_dream_weights_are_mapped_or_taken_in_another_format(tmp_path, dream, capfd):
    write_dream(tmp_path, dream, shards=3)
    state = weights.load_checkpoint(str(tmp_path), "--ckpt", dtype=torch.bfloat16)
    model = weights.build_model(state, ema=True)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    half = Dream(dream.config).half()
    half.load_state_dict(dream.state_dict())
    write_dream(tmp_path, half, shards=3)
    assert "float16" not in capfd.readouterr().err
    model = load(tmp_path)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert capfd.readouterr().err.count("float16 weights") == 1, "one notice for all shards"


def remove_shard(folder):
    (folder / "model-00002.safetensors").unlink()


def name_absent_tensor(folder):
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["model.layers.9.mlp.up_proj.weight"] = "model-00001.safetensors"
    file.write_text(json.dumps(index))


def says(**changes):
    def change(folder):
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_shard, "shard model-00002.safetensors is missing"),
        (name_absent_tensor, "names model.layers.9.mlp.up_proj.weight, which no shard holds"),
        (
            says(vocab_size=513),
            r"model.embed_tokens.weight of shape \(512, 64\), where \(513, 64\)",
        ),
        (says(num_hidden_layers=3), "missing model.layers.2"),
        (says(num_hidden_layers=1), "unexpected model.layers.1"),
        (says(rope_scaling={"type": "yarn"}), "rope_scaling .*yarn.*not supported"),
        (says(rope_parameters={"rope_type": "linear"}), "rope_scaling .*linear.*not supported"),
        (says(hidden_act="gelu"), "hidden_act gelu: not supported"),
        (says(use_sliding_window=True), "use_sliding_window True: not supported"),
        (says(tie_word_embeddings=True), "tie_word_embeddings True: not supported"),
        (says(layer_types=["linear_attention"]), "layer_types .*not supported"),
        (says(head_dim=32), "head_dim 32: not supported"),
        (says(mask_token_id=600), "mask 600 outside"),
        (says(hidden_size="x"), "config.json|no checkpoint"),
        (lambda folder: (folder / "config.json").write_text("{"), "no checkpoint"),
        (lambda folder: (folder / "config.json").write_text("[]"), "no checkpoint"),
        (lambda folder: (folder / "config.json").unlink(), "neither ckpt.pt nor config.json"),
        (lambda folder: os.truncate(folder / "model-00001.safetensors", 2000), "no checkpoint"),
    ],
)
def test_a_damaged_dream_folder_is_named_in_one_line(tmp_path, dream, damage, message):
    write_dream(tmp_path, dream, shards=3)
    damage(tmp_path)
    with pytest.raises((ValueError, OSError), match=message) as error:
        load(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_rope_base_is_read_wherever_it_stands(tmp_path, dream):
    write_dream(tmp_path, dream, rope_theta=None, rope_parameters={"rope_theta": 5e4})
    assert load(tmp_path).config.rope_base == 5e4


# Adapters


@pytest.fixture
def adapter(tmp_path, dream):
    """A folder that peft wrote of a random DoRA (r 4, alpha 8) on q, k, v, o, and its network."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4, lora_alpha=8, use_dora=True, task_type="CAUSAL_LM",
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
    )  # fmt: skip
    model = peft.get_peft_model(qwen2_of(dream), config)
    for name, p in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, std=0.3)
            if "magnitude" in name:
                torch.nn.init.uniform_(p, 0.5, 2)
    model.save_pretrained(tmp_path)
    return tmp_path, model.merge_and_unload()


def test_an_adapter_of_pefts_merges_to_the_weights_that_peft_merges(adapter, dream):
    folder, theirs = adapter
    ours = Dream(dream.config)
    ours.load_state_dict(dream.state_dict())
    read = weights.read_adapter(str(folder), "--adapter")
    assert read["softmask"] is None and read["schedule"] == "none"
    assert (read["r"], read["alpha"]) == (4, 8)
    assert len(read["modules"]) == 4 * dream.config.n_layers
    weights.merge_adapter(ours, read)
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p, theirs.state_dict()[weights.published_name(name)])
    assert not torch.equal(ours.layers[0].q_proj.weight, dream.layers[0].q_proj.weight)


def put(file, **entries):
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | entries))


@pytest.mark.parametrize(
    ("entries", "k", "schedule"),
    [
        ({"transparency_alg": "none"}, "binary", "none"),
        ({"transparency_alg": "mixinputs_with_topk", "mixinputs_k": 2}, 2, "none"),
        (
            {"transparency_alg": "mixinputs_with_temp", "mixture_temp": 0.5,
             "transparency_scheduling": "stepwise"}, None, "step",
        ),
    ],
)  # fmt: skip
def test_the_soft_mask_of_a_released_adapter_comes_along(adapter, entries, k, schedule):
    folder, _ = adapter
    omegas = {"transparency_scale": 0.4, "transparency_steepness": 2.0, "transparency_centre": -1.5}
    put(folder / "transparency_config.json", **omegas, **entries)
    read = weights.read_adapter(str(folder), "--adapter")
    assert read["schedule"] == schedule
    if k == "binary":
        assert read["softmask"] is None
        return
    softmask = weights.build_softmask(read)
    want = {"omega_s": 0.4, "omega_a": 2.0, "omega_b": -1.5} | ({} if k else {"tau": 0.5})
    assert softmask.k == k and softmask.omegas() == pytest.approx(want)


@pytest.mark.parametrize(
    ("file", "entries", "message"),
    [
        ("adapter_config.json", {"use_rslora": True}, "use_rslora True is not supported"),
        ("adapter_config.json", {"rank_pattern": {"q": 2}}, "rank_pattern .* is not supported"),
        ("adapter_config.json", {"bias": "all"}, "bias all is not supported"),
        ("adapter_config.json", {"peft_type": "IA3"}, "peft_type IA3 is not supported"),
        ("adapter_config.json", {"use_dora": False}, "lora_magnitude_vector.*are needed"),
        ("adapter_config.json", {"r": 0}, "no adapter that can be read"),
        ("transparency_config.json", {"transparency_alg": "new"}, "transparency_alg new"),
        ("transparency_config.json", {}, "no adapter that can be read"),
    ],
)
def test_an_adapter_that_is_not_supported_is_refused_by_name(adapter, file, entries, message):
    folder, _ = adapter
    put(folder / file, **entries)
    with pytest.raises(ValueError, match=message):
        weights.read_adapter(str(folder), "--adapter")


def test_an_adapter_for_another_base_is_named_by_its_first_misfit(adapter, dream):
    folder, _ = adapter
    read = weights.read_adapter(str(folder), "--adapter")
    for sizes, message in (
        ({"n_layers": 1}, "no layers.1.k_proj.weight in this network"),
        ({"width": 32, "n_heads": 2}, "another base"),
    ):
        other = Dream(DreamConfig(**{**DREAM_SIZES["dream-tiny"], **sizes}))
        with pytest.raises(ValueError, match=message):
            weights.merge_adapter(other, read)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors"):
        weights.read_adapter(str(folder), "--adapter")


# Adapters that we write


def random_adapter(model, targets, dora=True):
    """A DoRA (r 3, alpha 7) of a network's layers, far from its start."""
    modules = {}
    for name, w in model.named_parameters():
        if name.rsplit(".", 2)[-2:] in [[target, "weight"] for target in targets]:
            modules[name] = {"lora_A": torch.randn(3, w.shape[1]), "lora_B": torch.randn(len(w), 3)}
            if dora:
                modules[name]["lora_magnitude_vector"] = torch.rand(len(w)) + 0.5
    return {"r": 3, "alpha": 7.0, "dropout": 0.25, "targets": targets, "modules": modules}


PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj"]


def with_adapter(model, adapter):
    """Another network of the weights W' that DoRA's formula gives, computed here in float64."""
    ours = type(model)(model.config)
    ours.load_state_dict(model.state_dict())
    for name, parts in adapter["modules"].items():
        a, b, *m = (v.double() for v in parts.values())
        w = ours.get_parameter(name)
        new = w.double() + adapter["alpha"] / adapter["r"] * b @ a
        w.data = (new if not m else new * (m[0] / new.norm(dim=1))[:, None]).float()
    return ours.eval()


@pytest.mark.parametrize("dora", [True, False])
def test_a_written_adapter_gives_the_same_outputs_in_peft(tmp_path, dream, dora):
    peft = pytest.importorskip("peft")
    adapter = random_adapter(dream, PROJECTIONS, dora)
    weights.write_adapter(tmp_path, adapter, "some/base", None)
    theirs = peft.PeftModel.from_pretrained(qwen2_of(dream), tmp_path).eval()
    tokens, everywhere = torch.arange(30)[None], torch.zeros(1, 1, 30, 30)
    with torch.no_grad():
        want = theirs(tokens, attention_mask=everywhere).logits[0]
        plain = qwen2_of(dream).eval()(tokens, attention_mask=everywhere).logits[0]
    own = dream_logits(with_adapter(dream, adapter))
    torch.testing.assert_close(own[1:], want[:-1], atol=1e-4, rtol=1e-4)  # Dream's shift
    torch.testing.assert_close(dream_logits(dream)[1:], plain[:-1], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(want, plain, atol=0.1)
    assert theirs.peft_config["default"].lora_dropout == 0.25


def test_a_written_adapter_has_the_published_names_and_settings(tmp_path, dream):
    from safetensors.torch import load_file

    adapter = random_adapter(dream, PROJECTIONS)
    q = adapter["modules"]["layers.1.q_proj.weight"]
    adapter["modules"]["layers.1.q_proj.weight"] = {n: t.bfloat16() for n, t in q.items()}
    weights.write_adapter(tmp_path, adapter, "Dream-org/Dream-v0-Instruct-7B", None)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    shapes = {}
    for i in range(dream.config.n_layers):
        for part, out in zip("qkvo", (64, 32, 32, 64)):
            stem = f"base_model.model.model.layers.{i}.self_attn.{part}_proj"
            shapes[f"{stem}.lora_A.weight"] = (3, 64)
            shapes[f"{stem}.lora_B.weight"] = (out, 3)
            shapes[f"{stem}.lora_magnitude_vector"] = (out,)
    assert {name: tuple(t.shape) for name, t in tensors.items()} == shapes
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    assert json.loads((tmp_path / "adapter_config.json").read_text()) == {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 3, "lora_alpha": 7.0,
        "lora_dropout": 0.25, "target_modules": PROJECTIONS, "use_dora": True, "bias": "none",
        "fan_in_fan_out": False, "use_rslora": False, "modules_to_save": None,
        "base_model_name_or_path": "Dream-org/Dream-v0-Instruct-7B", "inference_mode": True,
    }  # fmt: skip
    assert json.loads((tmp_path / "transparency_config.json").read_text()) == {
        "transparency_alg": "none"
    }
    assert len(os.listdir(tmp_path)) == 3


@pytest.mark.parametrize("dora", [True, False])
def test_a_written_adapter_is_read_back_to_the_bit(tmp_path, dream, dora):
    adapter = random_adapter(dream, PROJECTIONS, dora)
    weights.write_adapter(tmp_path, adapter, "x", None)
    read = weights.read_adapter(str(tmp_path), "--adapter")
    for name in ("r", "alpha", "dropout", "targets"):
        assert read[name] == adapter[name]
    assert read["modules"].keys() == adapter["modules"].keys()
    for name, parts in adapter["modules"].items():
        assert read["modules"][name].keys() == parts.keys()
        assert all(torch.equal(read["modules"][name][part], parts[part]) for part in parts)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["use_dora"] is dora


@pytest.mark.parametrize(
    ("k", "schedule", "theirs", "scheduling"),
    [
        (1, "none", "mixinputs_with_topk", "none"),
        (3, "step", "mixinputs_with_topk", "stepwise"),
        (None, "linear", "mixinputs_with_temp", "linear"),
    ],
)
def test_a_written_soft_mask_comes_back(tmp_path, dream, k, schedule, theirs, scheduling):
    softmask = SoftMask(k)
    softmask.set_omegas(0.37, 4.5, -1.25, *([0.6] if k is None else []))
    adapter = random_adapter(dream, ["q_proj"]) | {"schedule": schedule}
    weights.write_adapter(tmp_path, adapter, "x", softmask)
    written = json.loads((tmp_path / "transparency_config.json").read_text())
    assert written.pop("transparency_alg") == theirs and written.pop("mixinputs_k") == k
    assert written.pop("transparency_scheduling") == scheduling
    assert written == pytest.approx(
        {
            "transparency_scale": 0.37, "transparency_steepness": 4.5,
            "transparency_centre": -1.25, "mixture_temp": 0.6 if k is None else 1.0,
        },
        rel=1e-5,
    )  # fmt: skip
    read = weights.read_adapter(str(tmp_path), "--adapter")
    again = weights.build_softmask(read)
    assert read["schedule"] == schedule and again.k == k
    assert again.omegas() == pytest.approx(softmask.omegas(), rel=1e-6)


def test_an_adapter_of_a_dit_gives_the_same_outputs_in_peft(tmp_path, networks):
    peft = pytest.importorskip("peft")
    base = networks[0]
    adapter = random_adapter(base, ["attn_qkv", "attn_out", "adaLN"])
    assert len(adapter["modules"]) == 7
    weights.write_adapter(tmp_path, adapter, "x", SoftMask(3))
    copy = DiT(base.config)
    copy.load_state_dict(base.state_dict())
    theirs = peft.PeftModel.from_pretrained(copy, tmp_path).eval()
    want = logits(with_adapter(base, adapter))
    torch.testing.assert_close(logits(theirs.base_model.model), want, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(want, logits(base), atol=0.1)
    config = peft.LoraConfig(r=3, use_dora=True, target_modules=["attn_qkv", "attn_out", "adaLN"])
    fresh = DiT(base.config)
    fresh.load_state_dict(base.state_dict())
    named = peft.get_peft_model_state_dict(peft.get_peft_model(fresh, config))
    with weights.safe_open(tmp_path / "adapter_model.safetensors", framework="pt") as f:
        assert set(f.keys()) == set(named)


def test_an_adapter_that_cannot_be_written_leaves_the_old_one(tmp_path, dream, monkeypatch):
    weights.write_adapter(tmp_path, random_adapter(dream, ["q_proj"]), "x", None)
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}

    def replace(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="adapter_model.safetensors"):
        weights.write_adapter(tmp_path, random_adapter(dream, ["v_proj"]), "y", SoftMask(3))
    assert before == {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
