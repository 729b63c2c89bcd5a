"""Writes the two byte arrays of a light skeleton (`bpftool gen skeleton -L`), the loading program and its data, and the order
of maps and programs, for a program in another language."""

import re
import sys

ESCAPES = {"n": 10, "t": 9, "r": 13, "\\": 92, '"': 34, "a": 7, "b": 8, "f": 12, "v": 11}


def c_string(body):
    out, i = bytearray(), 0
    while i < len(body):
        if body[i] != "\\":
            out.append(ord(body[i]))
            i += 1
            continue
        hexadecimal = re.match(r"\\x([0-9a-fA-F]{2})", body[i:])
        octal = re.match(r"\\([0-7]{1,3})", body[i:])
        if hexadecimal:
            out.append(int(hexadecimal.group(1), 16))
            i += hexadecimal.end()
        elif octal:
            out.append(int(octal.group(1), 8))
            i += octal.end()
        else:
            out.append(ESCAPES[body[i + 1]])
            i += 2
    return bytes(out)


def main(header, directory):
    text = open(header).read()
    for name, field in (("data", "data"), ("code", "insns")):
        body = re.search(r"opts\.%s = \(void \*\)\"(.*?)\";" % field, text, re.S).group(1).replace("\\\n", "")
        with open(f"{directory}/fast_path.{name}", "wb") as out:
            out.write(c_string(body))
    maps = re.search(r"struct \{(.*?)\} maps;", text, re.S).group(1)
    progs = re.search(r"struct \{(.*?)\} progs;", text, re.S).group(1)
    with open(f"{directory}/fast_path.order", "w") as out:
        out.write("maps " + " ".join(re.findall(r"struct bpf_map_desc (\w+);", maps)) + "\n")
        out.write("programs " + " ".join(re.findall(r"struct bpf_prog_desc (\w+);", progs)) + "\n")


main(*sys.argv[1:])
