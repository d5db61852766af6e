"""Run the tutorial's code, so that its pictures stand beside this file: python docs/tutorial/draw.py"""

import os
import re
import tempfile
from pathlib import Path

here = Path(__file__).resolve().parent
page = here.parent / "tutorial.md"
program = "\n".join(re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE))
with tempfile.TemporaryDirectory() as folder:
    os.chdir(folder)
    exec(compile(program, page, "exec"), {})
    for picture in Path(folder).glob("*.png"):
        (here / picture.name).write_bytes(picture.read_bytes())
    os.chdir(here)
