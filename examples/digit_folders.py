"""Write scikit-learn's handwritten digits as PNG files, one folder per person, each with classes of their own.

python examples/digit_folders.py FOLDER anna ben cem
"""

import sys
from pathlib import Path

from PIL import Image

from personae.data import digits

PEOPLE = {"anna": (0, 1, 2, 3), "ben": (3, 4, 5, 6), "cem": (6, 7, 8, 9), "dora": (1, 4, 7)}


def main(folder: Path, names: list[str]) -> None:
    source = digits()
    for number, name in enumerate(PEOPLE):
        for label in PEOPLE[name] if name in names else ():
            (folder / name / str(label)).mkdir(parents=True, exist_ok=True)
            mine = (source.images.labels == label).nonzero().flatten()[number :: len(PEOPLE)]
            for index in mine.tolist():
                picture = Image.fromarray(source.images.pixels[index, 0].numpy())
                picture.save(folder / name / str(label) / f"{index}.png")
    print(f"wrote {', '.join(names)} to {folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
