"""A logger plugin of Snakemake (`--logger nrcg`): writes what happens to a run as JSON lines, for `nrcg run`.

Snakemake takes packages of such a name on its path for plugins; `nrcg run` puts the folder above there.
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
}
"""LogEvent -> what is written of it."""


class LogHandler(LogHandlerBase):
    """Appends a line for each event to the file that NRCG_EVENTS names."""

    writes_to_stream = writes_to_file = needs_rulegraph = False
    has_filter = has_formatter = True

    def emit(self, record: LogRecord) -> None:
        event = str(getattr(record, "event", ""))
        if event in FIELDS:
            entry = {"event": event} | {name: getattr(record, name) for name in FIELDS[event]}
            try:
                with open(os.environ["NRCG_EVENTS"], "a", encoding="utf-8") as file:
                    file.write(json.dumps(entry) + "\n")
            except OSError:  # a full disk stops no run
                pass
