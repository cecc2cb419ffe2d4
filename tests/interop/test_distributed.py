"""Two processes of four devices each, on this machine: the losses of one process, one checkpoint from both."""

from __future__ import annotations

import json
import pathlib
import socket
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).with_name("process_program.py")


def start(port, rank, folder):
    command = [sys.executable, str(SCRIPT), str(port), str(rank), str(folder)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(processes):
    try:
        done = [p.communicate(timeout=240) for p in processes]
    finally:
        for p in processes:
            p.kill()
    for p, (_, said) in zip(processes, done, strict=True):
        assert p.returncode == 0, said[-4000:]
    return [json.loads(out.splitlines()[-1]) for out, _ in done]


def test_two_processes_train_as_one(tmp_path):
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    first, second = finish([start(port, rank, tmp_path / "both") for rank in range(2)])
    (alone,) = finish([start(0, 0, tmp_path / "alone")])
    assert (first["world"], first["local"], first["mesh"], alone["world"], alone["mesh"]) == (2, 4, 8, 1, 4)
    assert first["losses"] == second["losses"] == pytest.approx(alone["losses"], rel=1e-4)
    assert first["norm"] == second["norm"] == pytest.approx(alone["norm"], rel=1e-4)
    assert first["norm again"] == second["norm again"] == first["norm"] != 0
    assert first["held"] < 0.6 * alone["held"], "each process holds half of the model"
    assert "full_tensor()" in first["refused"] and not alone["refused"]
    assert "Parameter containing" in first["repr"]
