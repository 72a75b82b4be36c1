#!/usr/bin/env python3
"""Writes data/unicode.h, the letters, numbers and white space that the tokenizer needs, and data/nfc.h, for NFC.

    pip install unicodedata2==16.0.0 && python3 data/unicode.py > data/unicode.h
    pip install tokenizers==0.23.3 && python3 data/unicode.py nfc > data/nfc.h

Unicode 16.0 is what PyPI tokenizers 0.23 and tiktoken 0.14 use; dev/test/check_tokenizer.py compares every character.
Python's own unicodedata is taken where unicodedata2 is missing: say so in a commit if its version differs."""
import sys

try:
    import unicodedata2 as unicodedata
except ImportError:
    import unicodedata

# The property White_Space (PropList.txt), which has not changed since Unicode 6.3.
SPACES = [0x85, 0xA0, 0x1680, 0x2028, 0x2029, 0x202F, 0x205F, 0x3000, *range(0x09, 0x0E), 0x20, *range(0x2000, 0x200B)]


def table(name, points):
    pairs = []
    for point in sorted(points):
        if pairs and pairs[-1][1] == point - 1:
            pairs[-1][1] = point
        else:
            pairs.append([point, point])
    print(f"\nstatic const int32_t {name}[] = {{ // {len(pairs)} ranges")
    row = "   "
    for first, last in pairs:
        item = f" 0x{first:x},0x{last:x},"
        if len(row + item) > 120:
            print(row)
            row = "   "
        row += item
    print(row + "\n};")


def general(letter):
    return [point for point in range(0x110000) if unicodedata.category(chr(point)).startswith(letter)]


def numbers(name, values, what, per_item):
    print(f"\nstatic const int32_t {name}[] = {{ // {len(values) // per_item} {what}")
    row = "   "
    for at in range(0, len(values), per_item):
        item = " " + "".join(f"{value:#x}," for value in values[at : at + per_item])
        if len(row + item) > 120:
            print(row)
            row = "   "
        row += item
    print(row + "\n};")


def nfc():
    """PyPI tokenizers normalises by older tables (of Unicode 9) than those of its classes of characters, and a model's
    ids depend on them. So each character that is newer than those tables, which the package shows, is left out."""
    from tokenizers import normalizers

    decomposed, composed = normalizers.NFD().normalize_str, normalizers.NFC().normalize_str
    points = [point for point in range(0x110000) if not 0xD800 <= point < 0xE000]
    marks = "\u0334\u0315\u0301\u3099\u094d\u0327\u0345"

    def is_known(c):
        texts = [text for mark in marks for text in ("x" + c + mark, "x" + mark + c)]
        return all(decomposed(text) == unicodedata.normalize("NFD", text) for text in texts)

    # Canonical decompositions into one or two characters; a Hangul syllable's follows from its number.
    triples = []
    for c in map(chr, points):
        parts = unicodedata.decomposition(c).split()
        if parts and not parts[0].startswith("<") and decomposed(c) != c:
            first, second = [int(part, 16) for part in parts + ["0"]][:2]
            excluded = second and composed(c) != c
            triples += [ord(c), first, -second if excluded else second]

    # Combining classes other than 0, in ranges.
    ranges = []
    for c in map(chr, points):
        order = unicodedata.combining(c)
        if order and is_known(c):
            if ranges and ranges[-1][1:] == [ord(c) - 1, order]:
                ranges[-1][1] = ord(c)
            else:
                ranges.append([ord(c), ord(c), order])
    print("""// Made by data/unicode.py: what NFC needs (Unicode Standard Annex 15), as PyPI tokenizers has it.
// Gives: nfc_decompositions, nfc_classes. Needs: nothing; data/normalize.h includes it.
#include <stdint.h>

// A character and the one or two that it is decomposed into. A negative second one: they are not composed again.""")
    numbers("nfc_decompositions", triples, "characters", 3)
    print("\n// First and last character, and their combining class.")
    numbers("nfc_classes", [value for triple in ranges for value in triple], "ranges", 3)


if sys.argv[1:] == ["nfc"]:
    nfc()
    sys.exit()

version = unicodedata.unidata_version
print(f"""// Made by data/unicode.py from Unicode {version}: the first and the last code point of each range.
#include <stdint.h>""")
table("unicode_letters", general("L"))
table("unicode_numbers", general("N"))
table("unicode_spaces", SPACES)
print(f"unicode.py: Unicode {version}", file=sys.stderr)
