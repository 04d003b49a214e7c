import json
import os
import platform
import subprocess
import sys

import pytest

needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="settings of glibc")
PROGRAM = """
import json, resource, sys
from mcl_clip.core.memory import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
def faults():
    block = bytearray(64 << 20)
    del block
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
first = faults()
print(json.dumps(min(faults() - first for _ in range(3))))
"""


def faults_of_a_second_block(side, **environment):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    program = subprocess.run(
        [sys.executable, "-c", PROGRAM, side], capture_output=True, check=True, env=clean | environment
    )
    return json.loads(program.stdout)


@needs_glibc
def test_freed_memory_is_taken_again_without_new_pages():
    assert faults_of_a_second_block("kept") < 100
    assert faults_of_a_second_block("returned") > 10_000


@needs_glibc
def test_settings_of_the_environment_stay():
    assert faults_of_a_second_block("kept", MALLOC_MMAP_THRESHOLD_="1048576") > 10_000
