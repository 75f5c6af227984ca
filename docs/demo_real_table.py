"""Print what `docs/demo-real.sh` measured, one line per width: `python docs/demo_real_table.py FOLDER`."""

import json
import sys
from pathlib import Path
from typing import Any

WIDTHS = ("bf16", "int8", "int4")


def read(path: Path) -> Any:
    """Return a document."""
    return json.loads(path.read_text(encoding="utf-8"))


def line(folder: Path, weights: str) -> str:
    """Return the size, the speed and the distance of one width."""
    size = sum(path.stat().st_size for path in (folder / weights).glob("*.safetensors"))
    bench, check = read(folder / f"{weights}.bench.json"), read(folder / f"{weights}.check.json")
    speed = f"{1 / bench['median_seconds_per_token']:.1f} tokens/s"
    if check.get("is_identical"):
        distance = "the original, bit for bit"
    else:
        share = check["num_different"] / check["num_tokens"]
        distance = f"KL {check['mean_kl']:.2g} per token, another token likeliest at {share:.1%}"
    return f"    {weights}  {size / 2**20:6.1f} MiB  {speed:>15}  {distance}"


if __name__ == "__main__":
    print("\n".join(line(Path(sys.argv[1]), weights) for weights in WIDTHS))
