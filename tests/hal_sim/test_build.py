# SPDX-License-Identifier: Apache-2.0
"""The compiled library: built once, kept, never trusted blindly, and done without where it cannot be had."""

import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import hal
from hal.errors import ConfigError
from hal_sim import build, native


@pytest.fixture(scope="session")
def real():
    """A library that was compiled for this session."""
    return build.compiled()


@pytest.fixture
def compiler(tmp_path, monkeypatch, real):
    """Sets CXX to a program that does what the test says, after it has counted its calls; the cache is empty."""
    calls = tmp_path / "calls"

    def use(body=f'cp "{real}" "$out"'):
        script = tmp_path / "compiler"
        script.write_text(
            f'#!/bin/sh\nif [ "$1" = --version ]; then echo 1.0; exit; fi\necho >> {calls}\n'
            f'while [ $# -gt 0 ]; do if [ "$1" = -o ]; then out=$2; fi; shift; done\n{body}\n'
        )
        script.chmod(0o755)
        monkeypatch.setenv("CXX", str(script))
        return lambda: len(calls.read_text().splitlines()) if calls.exists() else 0

    monkeypatch.setenv("HAL_CACHE", str(tmp_path / "cache"))
    native.library.cache_clear()
    yield use
    native.library.cache_clear()


def test_it_is_compiled_once_and_kept_where_only_its_user_writes(compiler, tmp_path):
    calls = compiler()
    first, second = build.compiled(), build.compiled()
    assert first == second
    assert calls() == 1
    assert first.is_relative_to(tmp_path / "cache")
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700
    assert first.parent.stat().st_mode & 0o777 == 0o700
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [first.parent.name]  # nothing unfinished


def test_other_sources_or_flags_are_another_library(compiler, monkeypatch, tmp_path):
    compiler()
    first = build.compiled()
    changed = tmp_path / "matrix_unit.cpp"
    changed.write_text(build.SOURCES[0].read_text() + "// changed\n")
    monkeypatch.setattr(build, "SOURCES", (changed, *build.SOURCES[1:]))
    second = build.compiled()
    assert second != first
    monkeypatch.setattr(build, "_FLAGS", (*build._FLAGS, "-DANOTHER"))
    assert build.compiled() not in (first, second)


@pytest.mark.parametrize("damage", ["one bit", "cut off", "no digest", "empty folder"])
def test_a_damaged_library_is_built_anew(damage, compiler):
    calls = compiler()
    library = build.compiled()
    good = library.read_bytes()
    if damage == "one bit":
        library.write_bytes(good[:5000] + bytes([good[5000] ^ 1]) + good[5001:])
    elif damage == "cut off":
        library.write_bytes(good[:5000])
    elif damage == "no digest":
        (library.parent / build.DIGEST).unlink()
    else:
        shutil.rmtree(library.parent)
        library.parent.mkdir()
    assert build.compiled().read_bytes() == good
    assert calls() == 2


def test_a_library_that_others_could_have_written_is_not_loaded(compiler, tmp_path):
    calls = compiler()
    build.compiled().parent.chmod(0o777)
    build.compiled()
    assert calls() == 2
    (tmp_path / "cache").chmod(0o777)
    assert not build.compiled().is_relative_to(tmp_path / "cache")


def test_what_is_replaced_is_moved_away_first(compiler, monkeypatch, tmp_path):
    # Another process may find the damage, too, and have put a good library there in the moment between look and removal.
    calls = compiler()
    complete = build.compiled().parent
    (complete / build.DIGEST).unlink()
    removed, remove = [], shutil.rmtree

    def noted(path, **options):
        removed.append(path)
        assert path == complete or not path.exists() or complete.exists()
        remove(path, **options)

    monkeypatch.setattr(shutil, "rmtree", noted)
    assert build.compiled().parent == complete
    assert calls() == 2
    assert removed
    assert complete not in removed
    assert list((tmp_path / "cache").iterdir()) == [complete]


def test_a_build_that_ends_while_another_looks_for_left_ones_is_no_matter(compiler, monkeypatch, tmp_path):
    compiler()
    (tmp_path / "cache" / ".building-x").mkdir(parents=True)
    (tmp_path / "cache").chmod(0o700)
    listed = Path.glob

    def glob(folder, pattern):
        for path in listed(folder, pattern):
            path.rmdir()
            yield path

    monkeypatch.setattr(Path, "glob", glob)
    assert build.compiled().is_relative_to(tmp_path / "cache")


def test_a_cache_of_roots_is_read(compiler, monkeypatch, tmp_path):
    calls = compiler()
    library = build.compiled()
    found = Path.stat

    def owned_by(user):
        def stat(path, **options):
            fields = list(found(path, **options))[:10]
            fields[4] = user
            return os.stat_result(fields)

        return stat

    monkeypatch.setattr(os, "getuid", lambda: 12345)
    monkeypatch.setattr(Path, "stat", owned_by(54321))
    assert build._mistrust(library.parent) == "it belongs to another user (54321)"
    monkeypatch.setattr(Path, "stat", owned_by(0))
    assert build.compiled() == library
    assert calls() == 1


@pytest.mark.parametrize("fault", ["mode", "owner", "file"])
def test_a_cache_that_is_named_and_cannot_be_used_is_said_once(fault, compiler, monkeypatch, tmp_path, caplog):
    compiler()
    cache = tmp_path / "cache"
    if fault == "file":
        cache.write_text("")
        words = "File exists"
    else:
        cache.mkdir(mode=0o700)
        if fault == "mode":
            cache.chmod(0o775)
            words = r"others can write to it (mode 775)"
        else:
            mistrust = build._mistrust
            monkeypatch.setattr(build, "_mistrust", lambda folder: "it is his" if folder == cache else mistrust(folder))
            words = "it is his"
    for _ in range(2):
        assert not build.compiled().is_relative_to(cache)
    assert native.library() is not None
    (record,) = caplog.records
    assert f"HAL_CACHE cannot be used: {cache}: " in record.getMessage()
    assert words in record.getMessage()


def test_a_cache_that_cannot_be_written_to_is_done_without(compiler, tmp_path, monkeypatch):
    calls = compiler()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HAL_CACHE", str(tmp_path / "file" / "cache"))
    library = build.compiled()
    assert library.exists()
    assert library.parent.parent.stat().st_mode & 0o777 == 0o700
    assert calls() == 1


@pytest.mark.parametrize(
    ("variable", "words"),
    [("/no/such/c++", "CXX names no compiler"), (" ", "CXX names no compiler"), ('g++ "', "No closing quotation"),
     ("/no/such/\udcfc", "CXX names no compiler"), ("false", "ended with status 1"), ("true", "ended with status 0")],
)  # fmt: skip
def test_without_a_compiler_torch_computes_and_it_is_said_once(variable, words, compiler, monkeypatch, caplog):
    compiler()
    monkeypatch.setenv("CXX", variable)
    with caplog.at_level(logging.WARNING, "hal"):
        assert native.library() is None
        assert native.library() is None
    assert len(caplog.records) == 1
    assert words in caplog.text
    native.library.cache_clear()
    monkeypatch.setenv("HAL_SIM_CORE", "native")
    with pytest.raises(ConfigError, match=words):
        native.library()
    with pytest.raises(ConfigError, match=words):
        hal.open_device("sim:h200")


def test_an_empty_name_is_none(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    ordinary = build._compiler()
    monkeypatch.setenv("CXX", "")
    assert build._compiler() == ordinary


@pytest.mark.parametrize("status", [0, 3])
def test_a_compilers_message_may_be_in_any_encoding(status, compiler, real, monkeypatch, caplog):
    compiler(f'printf "warnung: \\374ber\\n" >&2; cp "{real}" "$out"; exit {status}')
    script = Path(os.environ["CXX"])
    script.write_text(script.read_text().replace("echo 1.0", 'printf "\\374 1.0"'))
    assert (native.library() is None) == bool(status)
    assert ("status 3: warnung: \ufffdber" in caplog.text) == bool(status)
    assert len(caplog.records) == bool(status)


def test_the_first_line_of_a_compilers_message_is_passed_on(compiler):
    compiler('echo "matrix_unit.cpp:1: error: no such instruction" >&2; echo more >&2; exit 3')
    with pytest.raises(build.BuildFailed, match=r"status 3: matrix_unit.cpp:1: error: no such instruction$"):
        build.compiled()


def test_a_warning_is_one_short_line_whatever_a_compiler_says(compiler, monkeypatch):
    compiler("printf '%05000d' 0 >&2; exit 1")
    with pytest.raises(build.BuildFailed, match=r"status 1: 0{200}$"):
        build.compiled()
    monkeypatch.setenv("CXX", "echo")  # which prints the command
    with pytest.raises(build.BuildFailed, match=r"^echo ended with status 0 and made no library$"):
        build.compiled()


def test_what_the_loader_refuses_or_what_computes_wrongly_is_not_used(compiler, caplog, monkeypatch, tmp_path):
    calls = compiler('echo no library > "$out"')
    assert native.library() is None
    assert calls() == 2  # once more, and not again and again
    assert len(caplog.records) == 1
    assert "invalid ELF header" in caplog.text or "file too short" in caplog.text
    native.library.cache_clear()
    monkeypatch.setenv("HAL_CACHE", str(tmp_path / "another"))
    compiler()
    monkeypatch.setattr(native.twin, "multiply", lambda a, b, c, unit, least: c + a @ b + 1e-3)
    assert native.library() is None
    assert "does not compute what it should" in caplog.text


def test_what_is_intact_and_refused_by_the_loader_is_built_anew_once(compiler, caplog, tmp_path, real):
    calls = compiler()
    library = build.compiled()
    library.write_text("no library")
    (library.parent / build.DIGEST).write_text(build._digest(library))
    assert native.library() is not None
    assert not caplog.records
    assert calls() == 2
    assert library.read_bytes() == real.read_bytes()
    assert list((tmp_path / "cache").iterdir()) == [library.parent]


@pytest.fixture(scope="session")
def another(tmp_path_factory):
    """A library without most of the functions."""
    folder = tmp_path_factory.mktemp("another")
    (folder / "another.cpp").write_text('extern "C" int hal_sim_multiply() { return 0; }\n')
    command = [*build._compiler(), "-fPIC", "-shared", "another.cpp", "-o", "another.so"]
    subprocess.run(command, cwd=folder, check=True, timeout=300)
    return folder / "another.so"


def test_what_is_intact_and_another_library_is_built_anew_once(compiler, caplog, another, real):
    calls = compiler()
    library = build.compiled()
    shutil.copy(another, library)
    (library.parent / build.DIGEST).write_text(build._digest(library))
    assert native.library() is not None
    assert not caplog.records
    assert calls() == 2
    assert library.read_bytes() == real.read_bytes()


def test_a_compiler_that_makes_another_library_is_done_without(compiler, caplog, another):
    calls = compiler(f'cp "{another}" "$out"')
    assert native.library() is None
    assert calls() == 2
    assert len(caplog.records) == 1
    assert "undefined symbol: hal_sim_multiply_groups" in caplog.text


def test_torch_can_be_asked_for(compiler, monkeypatch, caplog):
    calls = compiler()
    monkeypatch.setenv("HAL_SIM_CORE", "torch")
    assert native.library() is None
    assert not caplog.records
    assert calls() == 0
    native.library.cache_clear()
    monkeypatch.setenv("HAL_SIM_CORE", "gpu")
    with pytest.raises(ConfigError, match="auto, native or torch"):
        native.library()
    with pytest.raises(ConfigError, match="auto, native or torch"):
        hal.open_device("sim:h200")


def test_processes_that_build_at_once_end_with_one_library(compiler, tmp_path, real):
    compiler(f'sleep 1; cp "{real}" "$out"')
    code = "from hal_sim import build; print(build.compiled().read_bytes()[:4])"
    running = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    said = [process.communicate(timeout=300) for process in running]
    assert [out for out, _ in said] == ["b'\\x7fELF'\n"] * 3, said
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_build_that_was_killed_leaves_nothing_that_is_taken_for_a_library(compiler, tmp_path, real, eventually):
    calls = compiler(f'head -c 3000 "{real}" > "$out"; sleep 600')
    process = subprocess.Popen(
        [sys.executable, "-c", "from hal_sim import build; build.compiled()"], start_new_session=True
    )
    assert eventually(lambda: calls() == 1, meanwhile=lambda: process.poll() is None)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    compiler()
    assert build.compiled().read_bytes() == real.read_bytes()
    (left,) = (tmp_path / "cache").glob(".building-*")
    os.utime(left, (time.time() - 3600,) * 2)
    shutil.rmtree(build.compiled().parent)
    build.compiled()
    assert not left.exists()


def test_all_that_is_included_names_the_cached_library():
    included = {name for source in build.SOURCES for name in re.findall(r'#include "(.+)"', source.read_text())}
    assert included <= {source.name for source in build.SOURCES}
    assert "groups.hpp" in included
