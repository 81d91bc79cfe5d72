"""Makes glyphs.npz, the drawings that `scenes` uses, from the font: `python -m chainrule.tiny.glyphs NotoColorEmoji.ttf`.

Only this module needs the font. The file in the package was made from Debian's fonts-noto-color-emoji 2.042. The font is under
the SIL Open Font License 1.1, whose text is in glyphs-OFL.txt.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from chainrule.tiny.scenes import GLYPHS, THINGS

STRIKE = 109  # the only bitmap size the font holds


def drawn(font: Path) -> dict[str, np.ndarray]:
    """Draw every thing by the font: premultiplied RGBA, (h, w, 4) uint8, cropped to what is drawn."""
    loaded, found = ImageFont.truetype(str(font), STRIKE), {}
    for name, character in THINGS.items():
        sheet = Image.new("RGBA", (160, 160))
        ImageDraw.Draw(sheet).text((10, 10), character, font=loaded, embedded_color=True)
        found[name] = np.asarray(sheet.crop(sheet.getbbox()))
    return found


if __name__ == "__main__":
    np.savez_compressed(GLYPHS, **drawn(Path(sys.argv[1])))  # type: ignore[arg-type]
