rule figures:
    """The paper's figures, as png and svg."""
    input:
        files(lambda one, wildcards: one.shown_shards()),
        forward="results/{experiment}/forward.csv",
        metrics="results/{experiment}/metrics.csv",
    output:
        [
            report(
                f"results/{{experiment}}/figures/{figure}.png",
                caption=f"../report/{figure}.rst",
                category="{experiment}",
            )
            for figure in FIGURES
        ],
        expand("results/{{experiment}}/figures/{figure}.svg", figure=FIGURES),
    log:
        "logs/{experiment}/figures.log",
    benchmark:
        "benchmarks/{experiment}/figures.tsv"
    localrule: True
    threads: 1
    resources:
        mem_mb=2000,
        runtime=30,
    params:
        config=settings_file("report"),
        results=subpath(input.metrics, parent=True),
    shell:
        "nrcg figures --config {params.config} --forward {input.forward} --metrics {input.metrics}"
        " --samples {params.results}/samples --out {params.results}/figures > {log} 2>&1"


rule report:
    """One self-contained HTML file: claims, tables, figures and sample grids."""
    input:
        files(lambda one, wildcards: one.shown_shards()),
        expand("results/{{experiment}}/figures/{figure}.png", figure=FIGURES),
        expand("models/{{experiment}}/classifiers/{role}/accuracy_over_t.csv", role=ROLES),
        files(lambda one, wildcards: one.studies()),
        ddpm="models/{experiment}/ddpm/training.csv",
        forward="results/{experiment}/forward.csv",
        metrics="results/{experiment}/metrics.csv",
        reference="results/{experiment}/reference.json",
    output:
        html=report(
            "results/{experiment}/report.html",
            caption="../report/report.rst",
            category="{experiment}",
        ),
        comparison="results/{experiment}/paper_comparison.md",
    log:
        "logs/{experiment}/report.log",
    benchmark:
        "benchmarks/{experiment}/report.tsv"
    localrule: True
    threads: 1
    resources:
        mem_mb=2000,
        runtime=30,
    params:
        config=settings_file("report"),
        results=subpath(input.metrics, parent=True),
        models=subpath(input.ddpm, ancestor=2),
    shell:
        "nrcg report --config {params.config} --forward {input.forward} --metrics {input.metrics}"
        " --samples {params.results}/samples --figures {params.results}/figures --models {params.models}"
        " --reference {input.reference} --comparison {output.comparison} --out {output.html} > {log} 2>&1"
