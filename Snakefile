# The pipeline: data set -> diffusion model and classifiers -> forward analysis and guided sampling -> evaluation -> report.
# Experiments are blocks of config.yaml; each is a target by its name, and `quickstart` is the default.
from snakemake.utils import min_version

min_version("9.3")


configfile: "config.yaml"


include: "workflow/rules/common.smk"


rule all:
    default_target: True
    input:
        experiment_results("quickstart"),


for experiment in CONFIG.experiments:

    rule:
        name:
            experiment
        input:
            experiment_results(experiment),

    # For dvc.yaml, which versions samples apart from their metrics.
    rule:
        name:
            f"{experiment}_samples"
        input:
            experiment_samples(experiment),


include: "workflow/rules/dataset.smk"
include: "workflow/rules/train.smk"
include: "workflow/rules/forward.smk"
include: "workflow/rules/sample.smk"
include: "workflow/rules/evaluate.smk"
include: "workflow/rules/report.smk"


onsuccess:
    finish_tracking("FINISHED")


onerror:
    finish_tracking("FAILED")
