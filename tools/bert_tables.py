#!/usr/bin/env python3
"""Prints the tables of BERT's characters in chapter 3 of babygpt.h, as Hugging Face's tokenizers sees them (pip install tokenizers).

Numbers are written to the base 26, capital letters for all digits but the last. A set is: how many to leave out, how many more than one
to take, and so on. A map is a list of runs: the gap from the last code, how many more than one, the step of the codes, the step of the
targets (0, 1 or 2), and the first target's difference from the last target (doubled; plus one where it is negative). A target of 0 is
no character; a code that comes again has one more target.
"""
import textwrap

from tokenizers import normalizers, pre_tokenizers

CODES = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]


def bert(**on):
    flags = {name: on.get(name, False) for name in ("clean_text", "handle_chinese_chars", "strip_accents", "lowercase")}
    return normalizers.BertNormalizer(**flags).normalize_str


def number(n):
    text = chr(ord("a") + n % 26)
    while n >= 26:
        n //= 26
        text = chr(ord("A") + n % 26) + text
    return text


def pack_set(codes):
    text, at, i = "", 0, 0
    while i < len(codes):
        n = 1
        while i + n < len(codes) and codes[i + n] == codes[i] + n:
            n += 1
        text += number(codes[i] - at) + number(n - 1)
        at, i = codes[i] + n, i + n
    return text


def pack_map(pairs):
    text, code, target, i = "", 0, 0, 0
    while i < len(pairs):
        best = (1, 1, 0)
        for step in (1, 2):
            for up in (0, 1, 2):
                n = 1
                while i + n < len(pairs) and pairs[i + n] == (pairs[i][0] + n * step, pairs[i][1] + n * up):
                    n += 1
                best = max(best, (n, step, up))
        n, step, up = best if best[0] > 1 else (1, 1, 0)
        change = pairs[i][1] - target
        text += number(pairs[i][0] - code) + number(n - 1) + number(step) + number(up) + number(abs(change) * 2 + (change < 0))
        code, target = pairs[i + n - 1][0], pairs[i + n - 1][1]
        i += n
    return text


def changes(function):
    pairs = []
    for c in CODES:
        to = function(chr(c))
        if to != chr(c) and not 0xAC00 <= c < 0xD7A4:  # Hangul is done by arithmetic
            pairs += [(c, ord(t)) for t in to] or [(c, 0)]
    return pairs


def show(name, text):
    print(f"constexpr char {name}[] =\n" + "\n".join(f'    "{line}"' for line in textwrap.wrap(text, 132)) + ";")


clean, split = bert(clean_text=True), pre_tokenizers.BertPreTokenizer().pre_tokenize_str
show("removed_ranges", pack_set([c for c in CODES if c < 0xE0000 and clean(chr(c)) == ""]))
show("punctuation_ranges", pack_set([c for c in CODES if len(split("a" + chr(c) + "b")) == 3]))
show("accent_map", pack_map(changes(bert(strip_accents=True))))
show("small_letter_map", pack_map(changes(bert(lowercase=True))))
