# The pipeline: data set -> diffusion model and classifiers -> forward analysis and guided sampling -> evaluation -> report.
# Experiments are blocks of config.yaml; each is a target by its name, and `quickstart` is the default.
from snakemake.utils import min_version

min_version("9.3")


# For `--software-deployment-method apptainer`, after: docker build -t nrcg:0.1.0 .
container: "docker-daemon://nrcg:0.1.0"


configfile: "config.yaml"


include: "workflow/rules/common.smk"


rule all:
    default_target: True
    input:
        targets("quickstart").results(),


for experiment in CONFIG.experiments:

    rule:
        name:
            experiment
        input:
            targets(experiment).results(),

    # For dvc.yaml, which versions samples apart from their metrics.
    rule:
        name:
            f"{experiment}_samples"
        input:
            targets(experiment).samples(),


include: "workflow/rules/dataset.smk"
include: "workflow/rules/train.smk"
include: "workflow/rules/forward.smk"
include: "workflow/rules/sample.smk"
include: "workflow/rules/evaluate.smk"
include: "workflow/rules/studies.smk"
include: "workflow/rules/densities.smk"
include: "workflow/rules/report.smk"


onstart:
    startup.send_leftovers()


onsuccess:
    startup.finish_tracking("FINISHED")


onerror:
    startup.finish_tracking("FAILED")
