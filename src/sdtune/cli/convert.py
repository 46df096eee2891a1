"""``sdtune convert INPUT OUTPUT --to FORM``."""

from __future__ import annotations

from typing import Annotated

import typer

from sdtune.cli.output import open_console
from sdtune.commands.convert import Dtype, convert
from sdtune.training.components.lora_names import Family, Form

app = typer.Typer(rich_markup_mode=None, add_completion=False)


@app.command()
def command(
    source: Annotated[
        str,
        typer.Argument(
            help="A .safetensors file, a folder with pytorch_lora_weights.safetensors, or one with PEFT adapters in "
            "unet/, text_encoder/, text_encoder_2/. Its form is found out from the content.",
            metavar="INPUT",
        ),
    ],
    output: Annotated[
        str, typer.Argument(help="The file for kohya, the folder for diffusers and peft.", metavar="OUTPUT")
    ],
    form: Annotated[
        Form,
        typer.Option(
            "--to", help="kohya: for A1111, Forge, ComfyUI, SD.Next. diffusers: load_lora_weights. peft: PeftModel."
        ),
    ],
    family: Annotated[
        Family | None, typer.Option(help="Family of the base model, if the LoRA's modules cannot tell.")
    ] = None,
    dtype: Annotated[
        Dtype, typer.Option(help="Type of the weights; auto keeps the source's and loses nothing.")
    ] = Dtype.AUTO,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a LoRA that OUTPUT holds.")] = False,
    json: Annotated[bool, typer.Option("--json", help="JSON lines instead of text.")] = False,
) -> None:
    """Convert a LoRA of Stable Diffusion 1, 2 or XL between the forms of diffusers, kohya and PEFT, without loss."""
    console = open_console(json)
    console.conversion(convert(source, output, form, family=family, dtype=dtype, overwrite=overwrite))
