# Distributions whose density is known; `densities` of config.yaml, which belongs to no experiment.
DENSITIES = CONFIG.densities.names if CONFIG.densities is not None else []


rule densities:
    input:
        "results/densities/report.html" if DENSITIES else [],


rule density:
    """A distribution, learned by each objective: bound and ODE beside the truth."""
    output:
        "results/densities/{density}.npz",
        models=directory("models/densities/{density}"),
        table="results/densities/{density}.csv",
    log:
        "logs/densities/{density}.log",
    benchmark:
        "benchmarks/densities/{density}.tsv"
    wildcard_constraints:
        density="|".join(DENSITIES) or "none",
    threads: 1
    resources:
        mem_mb=2000,
        runtime=60,
    params:
        config=density_settings,
    shell:
        "nrcg density --config {params.config} --density {wildcards.density} --threads {threads} --out {output.table}"
        " --models {output.models} > {log} 2>&1"


rule densities_table:
    """Every distribution in one table, with figures and a page."""
    input:
        expand("results/densities/{density}.csv", density=DENSITIES),
        ancient(expand("results/densities/{density}.npz", density=DENSITIES)),
    output:
        "results/densities/densities.csv",
        "results/densities/densities.svg",
        report("results/densities/densities.png", caption="../report/densities.rst", category="densities"),
        report("results/densities/points.png", caption="../report/points.rst", category="densities"),
        page="results/densities/report.html",
    log:
        "logs/densities/table.log",
    benchmark:
        "benchmarks/densities/table.tsv"
    localrule: True
    threads: 1
    resources:
        mem_mb=2000,
        runtime=10,
    params:
        tables=expand("results/densities/{density}.csv", density=DENSITIES),
        folder=subpath(output.page, parent=True),
    shell:
        "nrcg densities-table --tables {params.tables} --out {params.folder} > {log} 2>&1"
