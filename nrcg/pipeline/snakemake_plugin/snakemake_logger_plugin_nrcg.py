"""A logger plugin of Snakemake (`--logger nrcg`): writes what happens to a run as JSON lines, for `nrcg run`.

Snakemake finds plugins by their module's name on its path; `nrcg run` puts this folder there.
"""

import json
import os
from logging import LogRecord

from snakemake_interface_logger_plugins.base import LogHandlerBase

FIELDS = {
    "run_info": ("stats",),
    "job_info": ("jobid", "rule_name"),
    "job_finished": ("job_id",),
    "job_error": ("jobid", "rule_name", "log"),
    "progress": ("done", "total"),
}
"""Event -> what is written of it."""


class LogHandler(LogHandlerBase):
    """Appends a line for each event to the file that NRCG_EVENTS names."""

    writes_to_stream = writes_to_file = needs_rulegraph = False
    has_filter = has_formatter = True

    def emit(self, record: LogRecord) -> None:
        event, path = str(getattr(record, "event", "")), os.environ.get("NRCG_EVENTS")
        if event not in FIELDS or not path:
            return
        entry = {"event": event} | {name: getattr(record, name, None) for name in FIELDS[event]}
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(entry, default=str) + "\n")
        except OSError:  # a full disk stops no run
            pass
