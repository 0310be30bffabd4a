"""Where threads cannot be started, the existing ones take the step, to the same bits."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gradfused.backends import availability

COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
pytestmark = [
    pytest.mark.skipif(not availability()["cpu"].usable, reason=str(availability()["cpu"].reason)),
    pytest.mark.skipif(bool(os.environ.get("GRADFUSED_SANITIZE_INSIDE")), reason="sanitizers start threads themselves"),
]

# Lets no more than `allowed` threads live besides those from before: what `ulimit -u`, a container's limit of processes and a
# lack of memory look like.
SHIM = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>

atomic_int allowed = 1000000, started = 0, refused = 0;
typedef void* (*body)(void*);
typedef struct { body start; void* argument; } work;
typedef int (*create)(pthread_t*, const pthread_attr_t*, body, void*);
static pthread_key_t key;

static void leave(void* counted) { (void)counted; atomic_fetch_add(&allowed, 1); }
__attribute__((constructor)) static void prepare(void) { pthread_key_create(&key, leave); }

static void* run(void* argument) {
  work w = *(work*)argument;
  free(argument);
  pthread_setspecific(key, &key);
  return w.start(w.argument);
}

int pthread_create(pthread_t* thread, const pthread_attr_t* attr, body start, void* argument) {
  if (atomic_fetch_sub(&allowed, 1) <= 0) {
    atomic_fetch_add(&allowed, 1);
    atomic_fetch_add(&refused, 1);
    return EAGAIN;
  }
  work* w = malloc(sizeof(work));
  *w = (work){start, argument};
  atomic_fetch_add(&started, 1);
  return ((create)dlsym(RTLD_NEXT, "pthread_create"))(thread, attr, run, w);
}
"""

COMMON = """
import ctypes, os, sys, threading
import torch
import gradfused
from gradfused.nn import lpg_cross_entropy

def counter(name):
    return ctypes.c_int.in_dll(ctypes.CDLL(None), name)

def allow(count):
    counter("allowed").value = count

def values(count, shift):
    return (torch.arange(count, dtype=torch.float32, device="cpu") * 0.37 + shift).sin_()

def made():
    params = [torch.nn.Parameter(values(n, n)) for n in (200_000, 70_001, 13)]
    for p in params:
        p.grad = values(p.numel(), 0.5)
    return gradfused.AdamW(params, lr=0.01, clip_norm=1.0), params

LOGITS, TARGET = values(6_000 * 31, 1.0).view(-1, 31), torch.arange(6_000) % 31

def work(steps=2):
    optimizer, params = made()
    for _ in range(steps):
        optimizer.step()
    u = LOGITS.clone().requires_grad_()
    loss = lpg_cross_entropy(u, TARGET, [1.0, -1.0] * 15 + [0.0], 0.1)
    loss.backward()
    return [*(p.detach() for p in params), *(s["exp_avg_sq"] for s in optimizer.state.values()), loss.detach(), u.grad]

def check(found):
    assert all(map(torch.equal, found, expected))

def use(count):  # gradfused alone: torch's own operations would end the process for want of threads
    torch.get_num_threads = lambda: count

torch.set_num_threads(1)
expected = work()
use(4)
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", COMMON + code],
        env=os.environ | {"OMP_WAIT_POLICY": "passive", "GRADFUSED_BACKEND": "cpu"} | environment,
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A library that limits the number of threads, to be loaded before all others."""
    if COMPILER is None:
        pytest.skip("no C compiler: what stands in for pthread_create cannot be built")
    folder: Path = tmp_path_factory.mktemp("shim")
    (folder / "shim.c").write_text(SHIM)
    command = [COMPILER, "-O1", "-shared", "-fPIC", "-o", str(folder / "shim.so"), str(folder / "shim.c"), "-ldl"]
    subprocess.run(command, check=True)
    return str(folder / "shim.so")


SCENES = {
    "of a thread without a pool": """
for count in (0, 1, 2, 3, 4, 6):
    def fresh():  # OpenMP has no threads for it yet
        global found
        found = work()
    thread = threading.Thread(target=fresh)
    allow(1 + count)
    thread.start(); thread.join()
    check(found)
allow(0)
check(work())
assert counter("refused").value > 0
allow(1000)
before = counter("started").value
check(work())
assert counter("started").value > before
""",
    "of a thread with one, and after a fork": """
optimizer, params = made()
optimizer.step()
before = counter("started").value, counter("refused").value
allow(0)
optimizer.step()
assert (counter("started").value, counter("refused").value) == before  # those that there are suffice
assert all(map(torch.equal, (p.detach() for p in params), expected))
use(6)
check(work())
for count in (0, 2, 1000):
    child = os.fork()
    if child == 0:
        try:
            allow(count)
            check(work())
            os._exit(0)
        except BaseException:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
""",
    "of several threads at once": """
results = {}
def several(i):
    results[i] = work()
threads = [threading.Thread(target=several, args=(i,)) for i in range(3)]
allow(3 + 4)
for t in threads: t.start()
for t in threads: t.join()
assert len(results) == 3
for found in results.values(): check(found)
""",
}


@pytest.mark.parametrize("scene", SCENES)
def test_the_work_is_done_by_the_threads_there_are(scene: str, shim: str) -> None:
    done = run(SCENES[scene], LD_PRELOAD=shim)
    assert done.returncode == 0, done.stderr


def test_where_memory_for_threads_runs_out() -> None:
    """The limit of the address space leaves no room for a stack."""
    code = """
import resource
pages = int(open("/proc/self/statm").read().split()[0])
tensors = work()  # keeps what they take for those to come
del tensors
limit = pages * resource.getpagesize() + 20 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
check(work())
"""
    done = run(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody whose processes are counted from none")
def test_where_a_user_may_start_no_more_processes() -> None:
    code = """
import resource
resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
os.setresuid(64_321, 64_321, 64_321)
try:
    threading.Thread(target=print).start()
except RuntimeError:
    check(work())
else:
    print("unlimited")
"""
    done = run(code)
    assert done.returncode == 0, done.stderr
    if "unlimited" in done.stdout:
        pytest.skip("this system does not count a user's processes")
