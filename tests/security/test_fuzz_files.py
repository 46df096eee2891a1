"""Files that nobody meant to write: each is read, or refused by name; no exception of a library comes through."""

from __future__ import annotations

import io
import json
import struct
import tempfile
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

from sdtune.errors import SdtuneError
from sdtune.methods.base_models import find_base_model
from sdtune.methods.images import Fault, Picture, look, open_image
from sdtune.methods.layouts import Layout, check
from sdtune.methods.sources import LocalFile
from sdtune.training.components.import_lora import read_lora_file
from sdtune.training.components.single_file import detect_family, read_single_file
from tests.security.hostile import png, tiff, webp
from tests.security.mutations import JSON, like, mutated, safetensors
from tests.security.profiles import examples

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")


@cache
def pictures() -> list[bytes]:
    """One of each format and of the kinds that differ: paletted, transparent, grey of 16 bits, turned, animated."""
    found = []
    turned = Image.Exif()
    turned[274] = 6
    for mode in ("RGB", "RGBA", "P", "L", "I;16", "CMYK", "1"):
        for kind in FORMATS:
            stream = io.BytesIO()
            try:
                Image.new(mode, (16, 24), 1).save(stream, kind, exif=turned)
            except (OSError, ValueError, KeyError):
                continue
            found.append(stream.getvalue())
    stream = io.BytesIO()
    Image.new("P", (16, 16)).save(stream, "GIF", save_all=True, append_images=[Image.new("P", (16, 16), 5)])
    return [*found, stream.getvalue(), tiff(16, 16, pages=3), png(16, 16), webp((b"VP8X", bytes(10)))]


@examples(250)
@given(data=st.deferred(lambda: mutated(pictures())))
def test_pictures(data: bytes, tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(data)
    found = look(LocalFile("a.png", len(data), str(file)), decode=True)
    assert isinstance(found, Picture | Fault)
    header = look(LocalFile("a.png", len(data), str(file)), decode=False)
    assert isinstance(header, Picture | Fault)
    if isinstance(found, Picture) and not found.animated and found.width * found.height < 10**6:
        # What the check lets through is what a trainer opens; a PNG's pixels are only summed up there.
        try:
            assert open_image(file).mode == "RGB"
        except (OSError, ValueError, SyntaxError):
            assert found.format == "PNG"


# --- datasets ---------------------------------------------------------------------------------------------------------


NAMES = (
    "a.png", "b.jpg", "c.webp", "A.PNG", "a.txt", "a.caption", "metadata.jsonl", "metadata.csv", "metadata.parquet",
    "metadata.json", "10_cat/a.png", "10_cat/a.txt", "cat/a.png", "0_x/a.png", "-1_x/a.png", "99999999999_x/a.png",
    "_x/a.png", "1_/a.png", ".hidden", "x.zip", "noname", "s/metadata.jsonl", "ü (1).png", "a b.png",
    "x" * 200 + ".png",
)  # fmt: skip
ROW = {"file_name": "a.png", "text": "a cat"}
METADATA = st.lists(like(ROW), max_size=4).map(lambda rows: "\n".join(map(json.dumps, rows)).encode())
CELLS = st.lists(st.lists(st.sampled_from(["file_name", "text", "a.png", "", '"', "a,b", "\n", "../x"]), max_size=3))
CSV = CELLS.map(lambda rows: "\n".join(",".join(row) for row in rows).encode())


def contents() -> st.SearchStrategy[bytes]:
    return st.sampled_from(pictures()) | METADATA | CSV | st.binary(max_size=80) | st.text(max_size=30).map(str.encode)


@examples(120)
@given(
    files=st.dictionaries(st.sampled_from(NAMES), st.deferred(contents), max_size=6),
    layout=st.sampled_from(list(Layout)),
)
def test_datasets(files: dict[str, bytes], layout: Layout, tmp_path: Path) -> None:
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    try:
        ledger = check(folder, layout, resolution=64)
        assert json.dumps(ledger.to_json())
        for code in [found.message for found in ledger.findings]:
            assert code.isprintable()
        ledger.raise_for_errors()
    except SdtuneError as error:
        assert str(error)  # noqa: PT017


@examples(150)
@given(name=st.sampled_from(["metadata.jsonl", "metadata.csv"]), data=METADATA | CSV | st.binary(max_size=300))
def test_tables_of_text(name: str, data: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(pictures()[0])
    (tmp_path / name).write_bytes(data)
    check(tmp_path, Layout.CAPTIONED, decode=False)
    (tmp_path / name).unlink()


@cache
def tables() -> list[bytes]:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    found = []
    image = {"bytes": b"x", "path": "../a.png"}
    for rows in ([ROW] * 3, [{**ROW, "image": image}], [{"file_name": 1, "text": None}], [{"text": ["a"]}]):
        for compression in ("snappy", "gzip", "none"):
            stream = io.BytesIO()
            parquet.write_table(pyarrow.Table.from_pylist(rows), stream, compression=compression)
            found.append(stream.getvalue())
    return found


@examples(100)
@given(data=st.deferred(lambda: mutated(tables())))
def test_tables_in_parquet(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(pictures()[0])
    (tmp_path / "metadata.parquet").write_bytes(data)
    check(tmp_path, Layout.CAPTIONED, decode=False)


# --- models and LoRAs -------------------------------------------------------------------------------------------------


def lora(rank: int = 2) -> dict[str, torch.Tensor]:
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    return {f"{name}.lora_A.weight": torch.ones(rank, 4), f"{name}.lora_B.weight": torch.ones(4, rank)}


@cache
def loras() -> list[bytes]:
    kohya = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    of_kohya = {
        f"{kohya}.lora_down.weight": torch.ones(2, 4), f"{kohya}.lora_up.weight": torch.ones(4, 2),
        f"{kohya}.alpha": torch.tensor(2.0), f"{kohya}.dora_scale": torch.ones(4, 1),
    }  # fmt: skip
    adapter = json.dumps({"unet.lora_alpha": 4, "unet.alpha_pattern": {"to_q": 3}, "unet.use_rslora": True})
    return [
        save(lora(), {"lora_adapter_metadata": adapter, "sdtune": "x"}), save(of_kohya, {"ss_network_dim": "2"}),
        save({name: tensor.half() for name, tensor in lora().items()}), save({}), save({"x": torch.ones(1)}),
    ]  # fmt: skip


ENTRY = {"dtype": "F32", "shape": [2, 4], "data_offsets": [0, 32]}
DTYPES = ["F64", "F32", "F16", "BF16", "I64", "I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F4", "X", "", "F8_E8M0"]
PART = [
    "lora_A.weight",
    "lora_B.weight",
    "lora.down.weight",
    "lora_up.weight",
    "alpha",
    "dora_scale",
    "lora_magnitude_vector",
]
KEYS = st.builds(
    "{}.{}".format,
    st.sampled_from(
        ["unet.a.to_q", "lora_unet_a_to_q", "text_encoder.b", "lora_te_b", "unet.", "", "base_model.model.x"]
    ),
    st.sampled_from(PART),
)
ENTRIES = st.builds(
    lambda dtype, shape, offsets: {"dtype": dtype, "shape": shape, "data_offsets": offsets},
    st.sampled_from(DTYPES), st.lists(st.integers(-1, 5) | st.just(2**62), max_size=5),
    st.lists(st.integers(0, 64), min_size=2, max_size=2) | JSON,
)  # fmt: skip
HEADERS = st.dictionaries(KEYS | st.text(max_size=5), like(ENTRY) | ENTRIES, max_size=4) | like(
    {"__metadata__": {"a": "b"}}
)
FILES = st.builds(
    safetensors, HEADERS | st.binary(max_size=40), st.binary(max_size=64), st.none() | st.integers(0, 2**64 - 1)
)


def well_formed() -> st.SearchStrategy[bytes]:
    """Files that are safetensors, and of tensors that no LoRA has in this way."""
    kinds = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.uint8])
    tensors = st.builds(lambda shape, kind: torch.ones(shape).to(kind), st.lists(st.integers(0, 3), max_size=4), kinds)
    adapter = like({"unet.lora_alpha": 4, "unet.alpha_pattern": {"to_q": 3}, "unet.use_rslora": True}).map(json.dumps)
    metadata = st.dictionaries(
        st.sampled_from(["lora_adapter_metadata", "ss_network_dim", "ss_base_model_version", "sdtune_scale", "format"]),
        adapter | st.text(max_size=8), max_size=3,
    )  # fmt: skip
    return st.builds(save, st.dictionaries(KEYS, tensors, min_size=1, max_size=4), metadata)


@examples(250)
@given(data=st.deferred(lambda: mutated(loras())) | FILES | st.deferred(well_formed))
def test_loras(data: bytes, tmp_path: Path) -> None:
    file = tmp_path / "lora.safetensors"
    file.write_bytes(data)
    try:
        read_lora_file(file)
    except SdtuneError as error:
        assert "lora.safetensors" in str(error)  # noqa: PT017


@examples(60)
@given(
    config=like(
        {"peft_type": "LORA", "lora_alpha": 3, "r": 2, "alpha_pattern": {"x": 1}, "base_model_name_or_path": "a/b"}
    )
)
def test_adapters_of_peft(config: object, tmp_path: Path) -> None:
    folder = tmp_path / "unet"
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    names = {f"base_model.model.{name.removeprefix('unet.')}": tensor for name, tensor in lora().items()}
    (folder / "adapter_model.safetensors").write_bytes(save(names))
    try:
        read_lora_file(tmp_path)
    except SdtuneError as error:
        assert str(tmp_path) in str(error)  # noqa: PT017


@cache
def checkpoints() -> list[bytes]:
    """The beginning of a checkpoint of each family, not whole; and of other models."""
    unet = "model.diffusion_model."
    found = []
    for width, block in ((768, "input_blocks.1.1"), (1024, "input_blocks.1.1"), (2048, "input_blocks.4.1")):
        tensors = {
            f"{unet}input_blocks.0.0.weight": torch.zeros(4, 4, 3, 3),
            f"{unet}{block}.transformer_blocks.0.attn2.to_k.weight": torch.zeros(2, width),
            "first_stage_model.x": torch.zeros(1),
        }
        found.append(save(tensors, {"modelspec.prediction_type": "v"}))
    found.append(save({f"{unet}input_blocks.0.0.weight": torch.zeros(4)}))
    found.append(save({f"{unet}input_blocks.0.0.weight": torch.zeros(())}))
    key = f"{unet}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    found.append(save({f"{unet}input_blocks.0.0.weight": torch.zeros(4, 4, 3, 3), key: torch.zeros(3)}))
    stream = io.BytesIO()
    torch.save({"state_dict": {f"{unet}input_blocks.0.0.weight": torch.zeros(4, 4, 3, 3)}}, stream)
    old = io.BytesIO()
    torch.save({"state_dict": {"x": torch.zeros(3)}}, old, _use_new_zipfile_serialization=False)
    return [*found, stream.getvalue(), old.getvalue()]


@examples(150)
@given(data=st.deferred(lambda: mutated(checkpoints())) | FILES, suffix=st.sampled_from([".safetensors", ".ckpt"]))
def test_checkpoints_in_one_file(data: bytes, suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"model{suffix}"
    file.write_bytes(data)
    for read in (detect_family, lambda path: read_single_file(path, torch.float32)):
        try:
            read(file)
        except SdtuneError as error:
            assert "model" in str(error)  # noqa: PT017


@examples(80)
@given(
    index=like({"_class_name": "StableDiffusionPipeline"}),
    unet=like({"sample_size": 64, "block_out_channels": [1, 2], "cross_attention_dim": 768}),
    vae=like({"block_out_channels": [1, 2, 3]}),
)
def test_folders_of_models(index: object, unet: object, vae: object, tmp_path: Path) -> None:
    for name, content in (("model_index", index), ("unet/config", unet), ("vae/config", vae)):
        file = tmp_path / f"{name}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(content))
    try:
        found = find_base_model(str(tmp_path))
    except SdtuneError as error:
        assert "base_model" in str(error)  # noqa: PT017
    else:
        assert found.resolution is None or 0 < found.resolution <= 2**20


def test_brackets_without_end(tmp_path: Path) -> None:
    """Python's reader of JSON ends with another error than that of what is no JSON."""
    deep = "[" * 100_000
    for name in ("unet", "vae"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(deep)
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(SdtuneError, match=r"config.json cannot be read"):
        find_base_model(str(tmp_path))
    (tmp_path / "peft" / "unet").mkdir(parents=True)
    (tmp_path / "peft" / "unet" / "adapter_config.json").write_text(deep)
    with pytest.raises(SdtuneError, match="not a configuration of PEFT"):
        read_lora_file(tmp_path / "peft")


def test_a_header_may_not_be_longer_than_its_file(tmp_path: Path) -> None:
    file = tmp_path / "lora.safetensors"
    for length in (2**63, 2**64 - 1, 10**12, 0):
        file.write_bytes(struct.pack("<Q", length) + b"{}")
        with pytest.raises(SdtuneError, match=r"not a safetensors file|not a LoRA"):
            read_lora_file(file)
