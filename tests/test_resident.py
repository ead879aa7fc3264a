"""Code that has run is given back to the system, and runs again all the same."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from toolkit.resident import SMAPS, code_mappings, describe_allocator, map_tensors

ROOT = Path(__file__).resolve().parent.parent
TRAIN_AGAIN = """
import torch
from toolkit.resident import return_code_pages

def of_files():
    status = open("/proc/self/status").read()
    return int(status.partition("RssFile:")[2].split()[0]) >> 10

def step():
    torch.manual_seed(0)
    layer = torch.nn.Linear(300, 300)
    layer(torch.randn(64, 300)).square().sum().backward()
    return layer.weight.grad

first, before = step(), of_files()
return_code_pages()
after = of_files()
assert torch.equal(first, step())
print(before, after, of_files())
"""
MAPPING = """{addresses} {rights} 00001000 fe:01 {inode} {path}
Size:                 64 kB
Rss:                  64 kB
Anonymous:          {own:>4} kB
Swap:               {swapped:>4} kB
VmFlags: rd ex mr mw me
"""


def mapping(
    addresses: str = "7f00-7f10", rights: str = "r-xp", inode: int = 7, path: str = "/lib/a b.so", own: int = 0,
    swapped: int = 0,
) -> str:  # fmt: skip
    return MAPPING.format(addresses=addresses, rights=rights, inode=inode, path=path, own=own, swapped=swapped)


@pytest.mark.skipif(not SMAPS.exists(), reason="Linux alone says which pages are code")
def test_code_is_given_back_and_comes_again() -> None:
    done = subprocess.run(
        [sys.executable, "-c", TRAIN_AGAIN], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    before, after, again = map(int, done.stdout.split())
    assert after < before - 40
    assert after < again < before - 20


@pytest.mark.parametrize(
    "other",
    [
        mapping(rights="r--p"), mapping(rights="rw-p"), mapping(rights="rwxp"), mapping(rights="r-xs"),
        mapping(path="[vdso]", inode=0), mapping(path="", inode=0), mapping(own=4), mapping(swapped=4),
    ],
)  # fmt: skip
def test_only_code_as_its_file_has_it_is_given_back(other: str) -> None:
    # Anything else would lose what the process wrote there.
    assert list(code_mappings(other)) == []
    around = mapping("1000-2000") + other + mapping("3000-a000")
    assert list(code_mappings(around)) == [(0x1000, 0x2000), (0x3000, 0xA000)]


BETWEEN = """
import sys
import torch
from toolkit.resident import map_tensors, return_freed_memory

def held():
    status = open("/proc/self/status").read()
    return int(status.partition("RssAnon:")[2].split()[0]) >> 10

# As a run finds the heap: once a large tensor was freed, glibc takes those that follow from it.
torch.ones(4 << 20)
for name in sys.argv[1].split(","):
    assert map_tensors(name == "compact") == (name == "compact")
start, small, large = held(), [], []
for _ in range(40):
    large.append(torch.ones(1 << 20))
    small.append(torch.ones(1 << 13))
full = held() - start
large.clear()
print(full, held() - start)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone has the setting")
def test_compact_memory_goes_back_although_tensors_behind_it_stay() -> None:
    found = {}
    for name in ("compact", "fast", "compact,fast"):
        done = subprocess.run(
            [sys.executable, "-c", BETWEEN, name], capture_output=True, text=True, check=False,
            env={**os.environ, "PYTHONPATH": str(ROOT), "GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        found[name] = [int(word) for word in done.stdout.split()]
    assert all(full > 150 for full, _ in found.values())
    assert found["compact"][1] < 20
    assert found["fast"][1] > 100
    # A later run in the same process finds the heap again.
    assert found["compact,fast"][1] > 100


@pytest.mark.parametrize("tunables", ["glibc.malloc.mmap_threshold=65536", "x:glibc.malloc.mmap_threshold=1"])
def test_a_threshold_of_the_users_own_is_left_alone(tunables: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLIBC_TUNABLES", tunables)
    monkeypatch.setattr("toolkit.resident._compact", False)
    assert not map_tensors(True)
    assert describe_allocator() == f"fast, {tunables}"
