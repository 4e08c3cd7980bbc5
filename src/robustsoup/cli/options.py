"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

Files = Annotated[
    list[Path],
    typer.Argument(help="Checkpoints: .safetensors, .pt, .pth or .bin.", show_default=False),
]
DataOption = Annotated[str, typer.Option("--data", help="digits, cifar10 or folder:PATH.")]
ThreatOption = Annotated[
    str, typer.Option("--threat", help='As in "Linf 8/255", "L2 0.5", "L1 12" or clean.')
]
Threats = Annotated[list[str], typer.Option("--threat", help='As in "Linf 8/255"; repeatable.')]
Model = Annotated[
    str | None,
    typer.Option(
        help="resnet50, resnet9:width=16 or package.module:factory; where files do not say."
    ),
]
Normalize = Annotated[
    tuple[str, str] | None,
    typer.Option(
        help='MEAN STD, by channel, for networks that expect it outside: "0.49,0.48,0.45" "0.25,0.24,0.26".'
    ),
]
Objective = Annotated[
    str,
    typer.Option(
        help='ce, "mixed 0.4" (0.4 is the weight of the clean loss), trades, "trades 5" (the weight of the KL term) or '
        "package.module:function."
    ),
]
ScheduleOption = Annotated[
    str, typer.Option("--schedule", help='cosine, constant, one-cycle, "one-cycle 0.1" or cyclic.')
]
AttackSteps = Annotated[int, typer.Option(help="APGD steps of each training attack.")]
Steps = Annotated[int, typer.Option(help="APGD or PGD steps of the evaluation.")]
Attack = Annotated[
    str,
    typer.Option(help="apgd, pgd or autoattack (the standard four; needs robustsoup[autoattack])."),
]
Loss = Annotated[str, typer.Option(help='What the attack climbs: ce, dlr or "targeted dlr".')]
Restarts = Annotated[int, typer.Option(help="Cold starts of the attack.")]
Eot = Annotated[
    int,
    typer.Option(
        help="Passes that a gradient is averaged over, for networks that answer at random."
    ),
]
SearchPrecision = Annotated[
    str,
    typer.Option(
        help="The attack's: auto, float32 or bfloat16. Every verdict is judged in float32."
    ),
]
Samples = Annotated[int | None, typer.Option(help="Judge only the first so many samples.")]
Buffers = Annotated[
    str | None,
    typer.Option(
        help="BatchNorm statistics: base, average, recalibrate, recalibrate-adversarial or tracked."
    ),
]
Seed = Annotated[
    int,
    typer.Option(
        min=0, max=2**63 - 1, help="The seed of the split, the order of samples and all noise."
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Threads = Annotated[
    int | None, typer.Option(min=1, help="CPU threads; results are bit-equal at equal numbers.")
]
Precision = Annotated[str, typer.Option(help="auto, float32 or bfloat16.")]
DataRoot = Annotated[
    str | None,
    typer.Option(help="Where data is; else $ROBUSTSOUP_DATA, else the user's cache folder."),
]
ImageSize = Annotated[int | None, typer.Option(help="Pixels a side, for folder:PATH.")]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print the answer as JSON on standard output.")
]
Granularity = Annotated[
    str, typer.Option(help="What has one softmax: parameter, module, block, model or re:PATTERN.")
]
Leakage = Annotated[
    bool,
    typer.Option("--allow-leakage", help="Judge on samples that an ingredient was trained on."),
]
Sets = Annotated[
    list[str],
    typer.Option("--set", help="Override a setting, as in soups.learned.epochs=2; repeatable."),
]
