"""The JSON schema of `config.yaml`, for editors."""

from __future__ import annotations

import copy

from nrcg.config.experiment import ExperimentConfig
from nrcg.config.methods import MethodConfig
from nrcg.config.studies import DensitiesConfig


def json_schema() -> dict:
    """JSON schema of config.yaml. An experiment may leave out what `defaults` gives: nothing is required of either."""
    schema = ExperimentConfig.model_json_schema(ref_template="#/$defs/{model}")
    definitions = schema.pop("$defs")
    definitions |= MethodConfig.model_json_schema(ref_template="#/$defs/{model}").pop("$defs", {})
    densities = DensitiesConfig.model_json_schema(ref_template="#/$defs/{model}")
    definitions |= densities.pop("$defs")
    definitions |= {"ExperimentConfig": schema, "DensitiesConfig": densities}
    definitions["MethodConfig"] = {
        key: value for key, value in MethodConfig.model_json_schema().items() if key != "$defs"
    }
    partial = {name: copy.deepcopy(body) for name, body in definitions.items() if name != "StabilizerConfig"}
    for body in partial.values():
        if body is not definitions["MethodConfig"]:
            body.pop("required", None)
    # What `defaults` says of the data set fits every source, so that more than one of them may match.
    partial["ExperimentConfig"]["properties"]["dataset"] = {
        "anyOf": partial["ExperimentConfig"]["properties"]["dataset"]["oneOf"],
        "description": ExperimentConfig.model_fields["dataset"].description,
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "nrcg config.yaml",
        "type": "object",
        "additionalProperties": False,
        "required": ["defaults", "methods", "experiments"],
        "properties": {
            "defaults": {"$ref": "#/$defs/ExperimentConfig"},
            "methods": {"type": "object", "additionalProperties": {"$ref": "#/$defs/MethodConfig"}},
            "experiments": {"type": "object", "additionalProperties": {"$ref": "#/$defs/ExperimentConfig"}},
            "densities": {"anyOf": [{"$ref": "#/$defs/DensitiesConfig"}, {"type": "null"}]},
        },
        "$defs": partial | {"StabilizerConfig": definitions["StabilizerConfig"]},
    }
