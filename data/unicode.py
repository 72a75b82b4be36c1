#!/usr/bin/env python3
"""Writes data/unicode.h, the letters, numbers and white space that the tokenizer needs.

    pip install unicodedata2==16.0.0 && python3 data/unicode.py > data/unicode.h

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


version = unicodedata.unidata_version
print(f"""// Made by data/unicode.py from Unicode {version}: the first and the last code point of each range.
#include <stdint.h>""")
table("unicode_letters", general("L"))
table("unicode_numbers", general("N"))
table("unicode_spaces", SPACES)
print(f"unicode.py: Unicode {version}", file=sys.stderr)
