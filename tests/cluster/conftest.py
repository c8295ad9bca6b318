"""One Slurm cluster for all tests of this directory, and a small dataset."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import ssh_hosts
from machines import missing_for_machines
from slurm_cluster import COMMANDS, SlurmCluster

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def slurm():
    reason = missing_for_machines(*COMMANDS)
    if reason:
        pytest.skip(reason)
    cluster = SlurmCluster()
    yield cluster
    cluster.close()


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    """English prose, one sentence per line: the documentation strings of a few modules."""
    import argparse
    import email.message
    import logging
    import pathlib
    import statistics
    import turtle

    modules = (argparse, email.message, logging, pathlib, statistics, turtle, subprocess, os)
    documents = []
    for module in modules:
        members = [module, *vars(module).values()]
        for owner in list(members):
            members += list(vars(owner).values()) if isinstance(owner, type) else []
        found = dict.fromkeys(
            member.__doc__ for member in members if isinstance(getattr(member, "__doc__", None), str)
        )
        sentences = [" ".join(part.split()) for doc in found for part in doc.split("\n\n")]
        documents.append("\n".join(line for line in sentences if len(line) > 20))
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(documents) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tokenizer(text, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    arguments = ["tokenizer", "--input", text, "--output", directory, "--vocab-size", "600"]
    subprocess.run([sys.executable, "-m", "data_prep", *arguments], check=True, cwd=ROOT, capture_output=True)
    return directory / "spiece.model"


@pytest.fixture(scope="session")
def hosts():
    reason = missing_for_machines(*ssh_hosts.COMMANDS)
    if reason:
        pytest.skip(reason)
    hosts = ssh_hosts.SshHosts()
    yield hosts
    hosts.close()


@pytest.fixture(scope="session")
def local_shards(text, tokenizer, tmp_path_factory) -> Path:
    """A dataset, built without a cluster."""
    directory = tmp_path_factory.mktemp("shards") / "data"
    build = ["build", "--input", text, "--tokenizer", tokenizer, "--output", directory, "--workers", "1"]
    settings = ["--max-seq-length", "32", "--eval-fraction", "0.1"]
    command = [sys.executable, "-m", "data_prep", *build, *settings]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    return directory
