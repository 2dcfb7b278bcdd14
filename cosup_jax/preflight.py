"""--mode=preflight: compiles the real train step without data or weights, for a slice one need not
have, and says what a step costs: memory, FLOPs, collectives, time."""

import dataclasses
import math
import os
import re
import time
from typing import Any

import jax
from jax.sharding import Mesh

from cosup_jax import assemble, sharding
from cosup_jax.config import Config, to_dict
from cosup_jax.costs import kernels, roofline
from cosup_jax.costs.roofline import GIB, Chip
from cosup_jax.data.batch import batch_shape
from cosup_jax.errors import UserError
from cosup_jax.rehearsal import Rehearsal, first_line, model_flops
from cosup_jax.runtime.workdir import Workdir
from cosup_jax.step import TrainState

_NAMED = 8  # of the largest buffers and replicated leaves


def preflight(config: Config, workdir: str, topology: str = "host", steps: int = 0) -> None:
    """Prints what a step costs and writes it to WORKDIR/preflight.json.

    Args:
      topology: "host", the devices present, or a TPU slice that libtpu knows, as "v5e:16x16".
      steps: on the host, so many steps are run on random data, and their time set beside the
        predicted one.

    Raises:
      UserError: unknown topology, no libtpu, a mesh that does not fit it, or a step that does not
        fit the memory.
    """
    if steps and topology != "host":
        raise UserError("--steps=N runs steps, which --topology=host alone can; drop one of them")
    devices = devices_of(topology, config.mesh.slices)
    with Workdir(workdir) as directory:
        config = assemble.resolve(config, shape_only=True)
        mesh = assemble.mesh_for(config, devices)
        job = Rehearsal(config, mesh)
        print(
            f"{job.parameters:,} parameters on {topology}: {mesh.size} x {devices[0].device_kind}, "
            + " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items()),
            flush=True,
        )
        started = time.perf_counter()
        compiled, problem = job.compile()
        found = {
            "topology": topology,
            "device_kind": devices[0].device_kind,
            "devices": mesh.size,
            "mesh": dict(mesh.shape),
            "parameters": job.parameters,
            "compile_s": time.perf_counter() - started,
            "replicated": replicated(job.state),
            "config": to_dict(config),
        }
        if compiled is None:
            found |= {"fits": False, "problem": problem}
        else:
            found |= account(job, compiled, _chip(devices[0], topology))
            if steps and found["fits"]:
                ran = job.run(compiled, steps)
                ran["mfu"] = found["mfu"] * found["estimate"]["step_s"] / ran["step_s"]
                found["measured"] = ran
        directory.write_json("preflight.json", found)
        _print(found)
    if not found["fits"]:
        raise UserError(f"does not fit {topology}: {_advice(found, config, mesh)}")


def devices_of(topology: str, slices: int = 1) -> list[jax.Device]:
    """The devices present for "host", or those of so many TPU slices, described by libtpu.

    Raises UserError for what is no name, and if libtpu is absent or does not know it.
    """
    if topology == "host":
        return jax.devices()
    if not re.fullmatch(r"\w+:\d+(x\d+)+", topology):
        raise UserError(f"--topology={topology} must be host or a TPU slice such as v5e:16x16")
    # What libtpu would else ask the machine, in vain, and complain.
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # no TPU is held: several may compile at once
    jax.config.update("jax_platforms", "cpu")
    try:
        import libtpu  # noqa: F401
    except ImportError:
        raise UserError(
            f"--topology={topology} needs libtpu to compile for a TPU: pip install -e '.[tpu]'"
        ) from None
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(topology, "tpu", num_slices=slices).devices
    except Exception as error:
        raise UserError(
            f"--topology={topology} is no TPU slice that libtpu knows ({first_line(error)}); "
            "write one as v5e:16x16, v5p:4x4x8 or v6e:16x16, or host"
        ) from error


def account(job: Rehearsal, compiled, chip: Chip | None) -> dict[str, Any]:
    """Memory, FLOPs, collectives and the estimate."""
    memory = _memory(compiled)
    try:
        program = kernels.read(compiled.as_text())
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            "this jaxlib cannot read what this libtpu compiles; pip install 'jax[tpu]' brings "
            f"two that match ({first_line(error)})"
        ) from error
    by_formula = model_flops(job.config, job.towers, job.state)
    found = {
        "memory": memory,
        "flops": program.flops * job.mesh.size,
        "flops_by_formula": by_formula,
        "collective_bytes": program.collective_bytes(),
        "loops_counted_at_most": program.bounded,
        "largest_buffers": [
            {"kernel": k.name, "bytes": k.result_bytes, "scope": k.scope}
            for k in program.largest(_NAMED)
        ],
        "fits": chip is None or memory["total"] <= chip.capacity,
        "chip": chip and dataclasses.asdict(chip),
    }
    if chip is not None:
        estimate = roofline.estimate(program, chip, memory["temporaries"])
        rate = by_formula / job.mesh.size / estimate.step_s
        used, _ = roofline.utilisation(rate, chip, job.config.gen.arch.dtype)
        found |= {"estimate": dataclasses.asdict(estimate), "mfu": used}
    return found


def replicated(state: TrainState) -> list[dict[str, Any]]:
    """Leaves of parameters and optimizer that an axis of several devices does not split."""
    found = []
    for name in ("params", "opt_state"):
        for path, leaf in jax.tree_util.tree_leaves_with_path(getattr(state, name)):
            whole = sharding.whole_over(leaf.sharding)
            if whole and leaf.size > 1:
                where = jax.tree_util.keystr(path, simple=True, separator="/")
                size = leaf.size * leaf.dtype.itemsize
                found.append({"leaf": f"{name}/{where}", "axes": whole, "bytes": size})
    return found


def _memory(compiled) -> dict[str, int]:
    """Bytes of one chip."""
    found = compiled.memory_analysis()
    parts = {
        "arguments": found.argument_size_in_bytes,
        "temporaries": found.temp_size_in_bytes,
        "output": found.output_size_in_bytes,
        "reused": found.alias_size_in_bytes,  # output that lies where an argument was
        "code": found.generated_code_size_in_bytes,
    }
    return parts | {"total": sum(parts.values()) - 2 * parts["reused"]}


def _chip(device: jax.Device, topology: str) -> Chip | None:
    return (
        roofline.measured(device) if topology == "host" else roofline.published(device.device_kind)
    )


def _advice(found: dict[str, Any], config: Config, mesh: Mesh) -> str:
    """What to change, the cheapest first."""
    steps = []
    for tower in ("gen", "ctx"):
        if getattr(config, tower).arch.remat != "full":
            steps.append(f"{tower}.arch.remat=full")
    rows = math.gcd(config.batch_size, batch_shape(config).U) // sharding.row_parts(mesh)
    if config.micro_batches < rows:
        more = next(m for m in range(config.micro_batches + 1, rows + 1) if rows % m == 0)
        steps.append(f"micro_batches={more} or more, {rows} at most")
    steps.append(
        f"more chips, or more of them in mesh.fsdp (now {mesh.shape['fsdp']}) or mesh.tensor"
    )
    what = found["problem"] if "problem" in found else f"{found['memory']['total'] / GIB:.1f} GiB"
    return f"{what}; change " + ", then ".join(steps)


def _print(found: dict[str, Any]) -> None:
    gib = lambda bytes_: f"{bytes_ / GIB:.2f} GiB"
    print(f"compiled in {found['compile_s']:.0f} s")
    if "memory" in found:
        memory = found["memory"]
        parts = ", ".join(f"{name} {gib(memory[name])}" for name in memory if name != "total")
        print(f"memory of a chip: {gib(memory['total'])} ({parts})")
        if found["chip"]:
            verdict = "fits" if found["fits"] else "does not fit"
            print(f"{verdict} the {gib(found['chip']['capacity'])} of {found['chip']['name']}")
        flops, formula = found["flops"], found["flops_by_formula"]
        print(
            f"FLOPs of a step: {flops:.3g} compiled, {formula:.3g} by formula without recomputing"
        )
        sent = {k: v for k, v in found["collective_bytes"].items() if v}
        listed = ", ".join(f"{kind} {v / 1e6:,.1f} MB" for kind, v in sent.items())
        print(f"sent by a chip each step: {listed or 'nothing'}")
        if found["loops_counted_at_most"]:
            print("NTP counted with every token supervised")
    if "estimate" in found:
        if found["chip"]["measured"]:
            print(f"measured: {roofline.ceilings(Chip(**found['chip']))}")
        e, name = found["estimate"], found["chip"]["name"]
        parts = (
            f"products {e['products_s']:.3g}, memory {e['memory_s']:.3g}, launches "
            f"{e['launch_s']:.3g}, network {e['exposed_network_s']:.3g} exposed and "
            f"{e['hidden_network_s']:.3g} beside"
            + (f", fresh memory {e['fresh_s']:.3g}" if found["chip"]["fresh"] else "")
        )
        print(f"predicted step on {name}: {e['step_s']:.4g} s ({parts}); MFU {found['mfu']:.1%}")
    if "measured" in found:
        m, predicted = found["measured"], found["estimate"]["step_s"]
        of_cores = " of its cores" if found["chip"]["name"] == "cpu" else ""
        print(
            f"measured step: {m['step_s']:.4g} s{of_cores} ({m['clock_s']:.4g} s by the clock); "
            f"MFU {m['mfu']:.1%}; predicted {predicted / m['step_s'] - 1:+.0%}"
        )
    whole = sorted(found["replicated"], key=lambda leaf: -leaf["bytes"])
    size = sum(leaf["bytes"] for leaf in whole)
    print(f"whole on every device of an axis: {len(whole)} leaves, {size / 2**20:.2f} MiB")
    for leaf in whole[:_NAMED]:
        print(f"  {leaf['leaf']} over {', '.join(leaf['axes'])}: {leaf['bytes'] / 2**20:.2f} MiB")
