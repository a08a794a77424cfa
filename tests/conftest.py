"""Shared by all tests: the shipped checkpoint, its bundle, small pretrained encoders, and the order of the tests."""

import dataclasses
import fcntl
import functools
import gc
import math
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from diffusers import ModelMixin
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

ROOT = Path(__file__).parents[1]
os.environ.setdefault("OMP_NUM_THREADS", "1")  # small models gain nothing from more, and lose much on a busy machine
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # as the packages do; some tests import ONNX Runtime first
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("STIV_THREADS", "1")  # the cores are taken: one worker runs on each


def no_gpu_reason() -> str | None:
    """Why GPU tests cannot run here; None if they can."""
    if shutil.which("nvidia-smi") is None:
        return "no NVIDIA GPU: nvidia-smi is not found"
    try:
        from stiv_deploy.runtime.command.doctor import cuda_driver

        cuda_driver()
    except Exception as error:
        return f"no usable CUDA driver: {error}"
    return None


def pytest_configure() -> None:
    """Let Ctrl-C through, here and in processes that tests start: a shell's background jobs begin with it ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)  # before ``-m`` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Fast tests first, so that a plain mistake shows at once; GPU tests are skipped, aloud, where there is no GPU.

    Where there is one, each has it alone.
    """
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    reason = no_gpu_reason() if on_gpu else None
    mark = pytest.mark.alone if reason is None else pytest.mark.skip(reason=reason)
    for item in on_gpu:
        item.add_marker(mark)


@pytest.fixture(scope="session", autouse=True)
def _no_lines_of_progress() -> None:
    """However slow this machine is: commands that are run in this process write no lines of progress."""
    from stiv_deploy.runtime import progress
    from stiv_deploy.stiv_ref import progress as reference_progress

    progress.FIRST_LINE = reference_progress.FIRST_LINE = math.inf


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


def pytest_collection_finish() -> None:
    """Take modules and tests out of the garbage collector's rounds: they stay, and are most of what there is."""
    gc.collect()
    gc.freeze()


Make = Callable[[Path], object]
Once = Callable[[str | Path, Make], Path]


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """``once(name, make)``: a path that ``make`` has made once for all workers of this run; do not write into it.

    The worker that asks first calls ``make(path)``, the others wait for it; after a failure the next one tries again.
    The passes of ``make test`` share what is made, in the folder ``STIV_TESTS_ONCE``. In the place of a name, an
    absolute path outlives the run: it should be named by the content of what it is made of.
    """
    base = tmp_path_factory.getbasetemp()
    own = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "once"
    shared = Path(os.environ.get("STIV_TESTS_ONCE", own))

    def made(name: str | Path, make: Make) -> Path:
        path = shared / name
        lock, done = (path.with_name(f"{path.name}.{end}") for end in ("lock", "done"))
        path.parent.mkdir(parents=True, exist_ok=True)
        with lock.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed, or the process ends
            if not done.exists():
                shutil.rmtree(path, ignore_errors=True)
                make(path)
                done.touch()
        return path

    return made


@pytest.fixture(scope="session")
def checkpoint(once: Once) -> Path:
    """Folder of the shipped checkpoint, or of an untrained one of the same architecture where it is absent."""
    shipped = ROOT / "checkpoints" / "tiny"
    if (shipped / "config.json").is_file():
        return shipped
    return once("checkpoint", save_untrained)


def save_untrained(folder: Path) -> None:
    """Write an untrained checkpoint of the shipped architecture, with no parameter at zero."""
    import torch

    from stiv_deploy.stiv_ref.checkpoint import save_checkpoint
    from stiv_deploy.stiv_ref.recipe import load_recipe
    from stiv_deploy.stiv_ref.training.stages import untrained_checkpoint

    untrained = untrained_checkpoint(load_recipe(ROOT / "recipes" / "tiny.toml"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in untrained.model.parameters():  # some start at zero and would switch their branch off
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
    save_checkpoint(folder, untrained)


@pytest.fixture(scope="session")
def traced_once() -> Iterator[None]:
    """In each worker, exports trace equal graph modules once: it is most of their time, and takes no weight's value.

    What is traced does not depend on who traced before: exports of processes of their own, which are not touched, are
    compared byte for byte by a test.
    """
    from stiv_deploy.export.graphs import writer

    traced: dict[str, Any] = {}
    trace = writer.trace

    def traced_before(module: Any, *what: Any) -> Any:
        key = described(module, *what)
        if key is None:
            return trace(module, *what)
        template = traced.pop(key, None) or trace(module, *what)
        traced[key] = dataclasses.replace(template, model=template.model.clone())
        return template

    writer.trace = traced_before
    yield
    writer.trace = trace


def described(module: Any, *what: Any) -> str | None:
    """All that a trace of ``module`` can depend on, in words; ``None`` where something has no words of its own."""
    from torch import nn

    inner = vars(nn.Module()).keys()
    parts = [
        (name, type(part), sorted((key, value) for key, value in vars(part).items() if key not in inner))
        for name, part in module.named_modules()
    ]
    state = [(name, value.shape, value.dtype) for name, value in module.named_parameters()]
    tables = [(name, value.dtype, value.tolist()) for name, value in module.named_buffers()]
    words = repr((what, parts, state, tables))
    return None if " at 0x" in words else words


@pytest.fixture(scope="session")
def bundle(checkpoint: Path, once: Once, traced_once: None) -> Path:
    """Folder of the fp32 bundle of ``checkpoint``, exported once per run: for slow tests; do not write into it."""
    from stiv_deploy.export.bundle_from_checkpoint import export_bundle
    from stiv_deploy.export.request import ExportRequest

    return once("bundle", lambda folder: export_bundle(ExportRequest(checkpoint=checkpoint, out=folder)))


WORDS = ("a", "red", "digit", "three", "moving", "left", "to", "the", "right", "up", "down", "and", "one", "two")
LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")


def unigram_tokenizer() -> "PreTrainedTokenizerFast":
    """A tokenizer of T5's form: pieces with a mark for the space, ended by ``</s>``."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -20.0)]
    pieces += [(f"▁{word}", -1.0 - rank) for rank, word in enumerate(WORDS)] + [(letter, -21.0) for letter in LETTERS]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def byte_pair_tokenizer() -> "PreTrainedTokenizerFast":
    """A tokenizer of CLIP's form: pairs merged up to words, between a start and an end token that also pads."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    start, end = "<|startoftext|>", "<|endoftext|>"
    tokens = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "re", "red</w>", start, end]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = [("r", "e"), ("re", "d</w>")]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, end_of_word_suffix="</w>", unk_token=end))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.RobertaProcessing((end, vocabulary[end]), (start, vocabulary[start]))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=end, bos_token=start, eos_token=end, unk_token=end
    )


def word_piece_tokenizer() -> "PreTrainedTokenizerFast":
    """A tokenizer of BERT's form: word pieces between ``[CLS]`` and ``[SEP]``."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS, "##s"]
    tokenizer = Tokenizer(models.WordPiece({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]"
    )


def small_text_model(architecture: str, tokens: int) -> "PreTrainedModel":
    """An untrained encoder of a real transformers class, 24 wide, two layers, with an embedding for ``tokens``."""
    import transformers

    common = {"vocab_size": tokens, "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2}
    common |= {"num_attention_heads": 3, "max_position_embeddings": 24}
    if architecture == "t5":
        sizes = {"d_model": 24, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 3}
        config = transformers.T5Config(vocab_size=tokens, feed_forward_proj="gated-gelu", pad_token_id=0, **sizes)
        return transformers.T5EncoderModel(config)
    if architecture == "clip":
        ends = {"bos_token_id": tokens - 2, "eos_token_id": tokens - 1, "pad_token_id": tokens - 1}
        return transformers.CLIPTextModel(transformers.CLIPTextConfig(**common, **ends))
    return transformers.BertModel(transformers.BertConfig(**common))


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders of untrained t5, clip and bert encoders as transformers saves them; do not write into them.

    Their weights are larger than transformers initializes them: attention is far from uniform, no layer a detail.
    """
    pytest.importorskip("transformers")
    tokenizers = {"t5": unigram_tokenizer, "clip": byte_pair_tokenizer, "bert": word_piece_tokenizer}

    @functools.cache
    def make(architecture: str) -> Path:
        import torch

        tokenizer = tokenizers[architecture]()
        model = small_text_model(architecture, len(tokenizer))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, tensor in model.named_parameters():
                noise = torch.randn(tensor.shape, generator=generator)
                if tensor.dim() == 1:
                    tensor.add_(noise, alpha=0.1)  # biases from 0, norms from 1
                else:
                    tables = ("embed", "shared", "relative")
                    tensor.copy_(noise if any(part in name for part in tables) else noise * 24**-0.5)
        folder = tmp_path_factory.mktemp("text") / architecture
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


def small_vae(class_name: str, **changes: object) -> "ModelMixin":
    """An untrained VAE of a real diffusers class, 4 channels, 1x2x2 (AutoencoderKL) or 4x8x8; ``changes`` to it."""
    import diffusers
    import torch

    per_frame: dict[str, object] = {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 4,
        "scaling_factor": 0.4,
        "shift_factor": 0.1,
    }
    causal: dict[str, object] = {
        "latent_channels": 4,
        "block_out_channels": (8, 16),
        "down_block_types": ("LTXVideoDownBlock3D",) * 2,
        "decoder_block_out_channels": (8, 16),
        "layers_per_block": (1, 1, 1),
        "decoder_layers_per_block": (1, 1, 1),
        "spatio_temporal_scaling": (True, True),
        "decoder_spatio_temporal_scaling": (True, True),
        "decoder_inject_noise": (False,) * 3,
        "downsample_type": ("conv",) * 2,
        "upsample_residual": (False,) * 2,
        "upsample_factor": (1,) * 2,
        "patch_size": 2,
        "scaling_factor": 1.5,
    }
    config = {"AutoencoderKL": per_frame, "AutoencoderKLLTXVideo": causal}[class_name] | changes
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: ModelMixin = getattr(diffusers, class_name)(**config)
        for name, buffer in model.named_buffers(recurse=False):
            buffer.copy_(torch.rand(buffer.shape) + 0.5 * (name == "latents_std"))
    return model


@pytest.fixture(scope="session")
def vae_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Folders of small VAEs as diffusers saves them, by class name, type, and what differs in their config."""
    pytest.importorskip("diffusers")

    def make(class_name: str, dtype: str = "float32", **changes: object) -> Path:
        import torch

        folder = tmp_path_factory.mktemp("vae") / class_name
        small_vae(class_name, **changes).to(getattr(torch, dtype)).save_pretrained(folder)
        return folder

    return make
