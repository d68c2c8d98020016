"""Are the weights of encoders at hand?"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

from cluster.doctor.finding import Finding, reason

_IMPORT_S = 120.0  # open_clip imports torch
_ASK_OPEN_CLIP = """
import sys
from open_clip.pretrained import download_pretrained, get_pretrained_cfg
found = get_pretrained_cfg(*sys.argv[1:])
print(download_pretrained(found) if found else "")
"""


def check_weights(name: str, location: str) -> Finding:
    """Are an encoder's weights on this machine?

    `location` is a file or directory, "package:MODULE" for weights inside an installed package,
    "open_clip:MODEL:TAG", or a name on the Hugging Face hub ("t5-small", "google/t5-v1_1-xxl",
    "hf-hub:ORGANISATION/MODEL"), looked for in its cache.
    """
    title = f"weights of {name}"
    if location.startswith("open_clip:"):
        _, model, tag = location.split(":", 2)
        return _check_tag(title, model, tag)
    if location.startswith("package:"):
        module = location.removeprefix("package:").partition(".")[0]
        ok = bool(module) and importlib.util.find_spec(module) is not None
        remedy = "" if ok else f"install the package that holds the module {module!r}"
        return Finding(name=title, ok=ok, found=location if ok else "no such module", remedy=remedy)
    location = location.removeprefix("hf-hub:").partition("@")[0]  # without its revision
    path = Path(location).expanduser()
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        return Finding(name=title, ok=True, found=str(path))
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", location) and not location.startswith("."):
        cached = _hub_cache() / f"models--{location.replace('/', '--')}" / "snapshots"
        if cached.is_dir() and any(cached.iterdir()):
            return Finding(name=title, ok=True, found=f"{location} in {_hub_cache()}")
        remedy = f"fetch them where there is a network (`hf download {location}`) or name a folder"
        return Finding(name=title, ok=False, found=f"{location}: not cached", remedy=remedy)
    remedy = "name a file or a folder that exists"
    return Finding(name=title, ok=False, found=f"{path}: missing or empty", remedy=remedy)


def _check_tag(title: str, model: str, tag: str) -> Finding:
    """Asks open_clip itself, in a process that cannot reach any network."""
    nowhere = "http://127.0.0.1:9"
    offline = {"HF_HUB_OFFLINE": "1", "http_proxy": nowhere, "https_proxy": nowhere}
    command, label = [sys.executable, "-c", _ASK_OPEN_CLIP, model, tag], f"{model} {tag}"
    try:
        asked = subprocess.run(
            command,
            env={**os.environ, **offline},
            capture_output=True,
            text=True,
            timeout=_IMPORT_S,
        )
    except (OSError, subprocess.SubprocessError) as error:
        remedy = "see whether `python -c 'import open_clip'` works"
        return Finding(name=title, ok=False, found=f"{label}: {reason(error)}", remedy=remedy)
    path = asked.stdout.strip()
    if asked.returncode == 0 and path:
        return Finding(name=title, ok=True, found=f"{label} at {path}")
    if asked.returncode == 0:
        remedy = "take a model and a tag of `open_clip.list_pretrained()`, or name a folder"
        return Finding(
            name=title, ok=False, found=f"{label}: open_clip knows no such", remedy=remedy
        )
    remedy = (
        'fetch them where there is a network (`python -c "import open_clip; '
        f"open_clip.create_model('{model}', pretrained='{tag}')\"`), or name a folder"
    )
    last = (asked.stderr.strip().splitlines() or ["no words"])[-1]
    found = f"{label}: not at hand ({last[:120]})"
    return Finding(name=title, ok=False, found=found, remedy=remedy)


def _hub_cache() -> Path:
    """Return the hub's cache directory by the rules of huggingface_hub."""
    home = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()
