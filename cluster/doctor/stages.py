"""Do the units of a recipe's stages fit the nodes that a profile promises?"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from cluster.doctor.finding import Finding
from cluster.places import NodeGroup
from cluster.profile import Profile


@dataclass(frozen=True, kw_only=True)
class UnitNeeds:
    """What one unit of a stage takes: so many workers at once, and of each so much.

    `node_group` is the one that the recipe names; "" leaves it to the profile. `placement` is the
    recipe's word for how workers stand together.
    """

    num_workers: int = 1
    cpus: float = 1.0
    gpus: float = 0.0
    memory_gib: float = 0.0
    node_group: str = ""
    placement: str = "pack"


def check_stages(profile: Profile, stages: Mapping[str, UnitNeeds]) -> list[Finding]:
    """Compare each stage with its node group, or with all groups where it has none."""
    if not profile.node_groups or not stages:
        return []
    wrong = list(_problems(profile, stages))
    title = f"{profile.name}: stages"
    if not wrong:
        names = ", ".join(one.name for one in profile.node_groups)
        found = f"units of {', '.join(stages)} fit the nodes of {names}"
        return [Finding(name=title, ok=True, found=found)]
    remedy = (
        "lower resources.STAGE in the recipe, or give the stage another group (stages in the "
        "profile) or the group larger or more nodes"
    )
    return [Finding(name=title, ok=False, found="; ".join(wrong), remedy=remedy)]


def _problems(profile: Profile, stages: Mapping[str, UnitNeeds]) -> Iterator[str]:
    groups = {one.name: one for one in profile.node_groups}
    for stage, needs in stages.items():
        name = needs.node_group or profile.stages.get(stage, "")
        if name and name not in groups:
            yield f"{stage} asks for group {name!r}, of {', '.join(groups)}"
        elif not _fits(needs, [groups[name]] if name else list(groups.values())):
            where = f"group {name}" if name else f"the groups {', '.join(groups)} together"
            yield f"a unit of {stage} takes {_words(needs)}, for which {where} has no room"


def _fits(needs: UnitNeeds, groups: Sequence[NodeGroup]) -> bool:
    """Whether one unit finds room on nodes that are empty."""
    room = [(_workers_on(one, needs), one.num_nodes) for one in groups]
    if needs.placement == "strict_pack":
        return max(num for num, _ in room) >= needs.num_workers
    if needs.placement == "strict_spread":
        room = [(min(num, 1), num_nodes) for num, num_nodes in room]
    return sum(num * num_nodes for num, num_nodes in room) >= needs.num_workers


def _workers_on(group: NodeGroup, needs: UnitNeeds) -> int:
    """How many workers find room on one node."""
    amounts = (
        (group.cpus_per_node, needs.cpus),
        (group.accelerators_per_node, needs.gpus),
        (group.memory_per_node_gib, needs.memory_gib),
    )
    return min(
        (int(has / takes + 1e-9) for has, takes in amounts if takes), default=needs.num_workers
    )


def _words(needs: UnitNeeds) -> str:
    amounts = (("CPUs", needs.cpus), ("GPUs", needs.gpus), ("GiB of memory", needs.memory_gib))
    each = ", ".join(f"{takes:g} {name}" for name, takes in amounts if takes)
    strict = f" ({needs.placement})" if needs.placement.startswith("strict") else ""
    return f"{needs.num_workers} workers of {each}{strict}"
