"""Who acts as one: a group of members that agrees on a record.

`table.py` is the specification, `ballot.py` what a voter must not forget, `changes.py` what the next record would say,
`links.py` which links it should not use, `core.py` elections, leading and following, which put them together.
"""

from shoal.membership.group.ballot import generation_of, is_quorum, record_hash
from shoal.membership.group.changes import VOTERS_MAX
from shoal.membership.group.core import GroupCore
from shoal.membership.group.facts import (
    Attach,
    CheckpointDue,
    CreateGroup,
    Decided,
    Doubted,
    GroupCommand,
    GroupFact,
    JoinGroup,
    LeaderChanged,
    LeaveGroup,
    RecordAdopted,
    Recover,
    ReportProgress,
    Resumed,
    Suspended,
)
from shoal.membership.group.table import GROUP_EVENTS, RECEPTIONS, ROLE, STANDING, Role, Standing

__all__ = [
    "GROUP_EVENTS",
    "RECEPTIONS",
    "ROLE",
    "STANDING",
    "VOTERS_MAX",
    "Attach",
    "CheckpointDue",
    "CreateGroup",
    "Decided",
    "Doubted",
    "GroupCommand",
    "GroupCore",
    "GroupFact",
    "JoinGroup",
    "LeaderChanged",
    "LeaveGroup",
    "RecordAdopted",
    "Recover",
    "ReportProgress",
    "Resumed",
    "Role",
    "Standing",
    "Suspended",
    "generation_of",
    "is_quorum",
    "record_hash",
]
