"""The doctor: finds what is wrong, and the line it gives would mend it."""

from __future__ import annotations

import importlib.metadata
import socket
import subprocess

import pytest

from reelhf import doctor
from reelhf.cli import main


def test_a_sound_machine_passes(capsys):
    main(["doctor"])
    out = capsys.readouterr().out
    assert "DeepSpeed" in out
    assert "everything that is needed works" in out


def test_what_is_missing_is_named_with_the_line_that_mends_it_and_exit_code_1(capsys, monkeypatch):
    real = importlib.metadata.version
    versions = {"gradio": "5.0.0"}

    def version(name):
        if name == "peft":
            raise importlib.metadata.PackageNotFoundError(name)
        return versions.get(name) or real(name)

    monkeypatch.setattr("reelhf.doctor.importlib.metadata.version", version)
    monkeypatch.setattr(doctor, "check_training", lambda: doctor.Finding("ok", "training", ""))
    with pytest.raises(SystemExit) as stop:
        main(["doctor"])
    assert stop.value.code == 1
    out = capsys.readouterr().out
    assert "peft is not installed" in out
    assert "gradio 5.0.0 is outside" in out
    assert "'peft>=" in out
    assert "'gradio" in out
    assert "1 needed: packages" in out


def test_a_port_in_use_is_found():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        doctor.PAGE_PORT, usual = taken.getsockname()[1], doctor.PAGE_PORT
        try:
            finding = doctor.check_port()
        finally:
            doctor.PAGE_PORT = usual
    assert finding.state == "optional"
    assert finding.mend == "reelhf demo --port 7870"


def test_little_disk_and_old_sqlite_are_found(monkeypatch):
    monkeypatch.setattr(doctor, "MIN_FREE_GB", 1e9)
    assert doctor.check_disk().state == "missing"
    monkeypatch.setattr(doctor, "MIN_SQLITE", (99, 0, 0))
    assert "too old" in doctor.check_database().detail


def test_a_broken_torchvision_is_found_and_an_absent_one_is_fine(monkeypatch):
    monkeypatch.setattr("reelhf.doctor.importlib.util.find_spec", lambda name: None)
    assert doctor.check_torchvision().state == "ok"
    monkeypatch.setattr("reelhf.doctor.importlib.util.find_spec", lambda name: object())
    failed = subprocess.CompletedProcess(
        [], 1, "", "RuntimeError: operator torchvision::nms does not exist\n"
    )
    monkeypatch.setattr("reelhf.doctor.subprocess.run", lambda *a, **k: failed)
    finding = doctor.check_torchvision()
    assert finding.state == "missing"
    assert "operator torchvision::nms does not exist" in finding.detail
    assert finding.mend.endswith("pip uninstall -y torchvision")


def test_no_browser_is_not_an_error(monkeypatch):
    monkeypatch.setattr("reelhf.doctor.shutil.which", lambda name: None)
    assert doctor.check_browser().state == "optional"
