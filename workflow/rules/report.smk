rule figures:
    """The paper's figures, as png and svg."""
    input:
        first_shards,
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
        "logs/{experiment}/figures.tsv"
    localrule: True
    conda:
        "../envs/nrcg.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=30,
    params:
        config=settings_file("report"),
        samples=folder("results/{experiment}/samples"),
        folder=folder("results/{experiment}/figures"),
    shell:
        "nrcg figures --config {params.config} --forward {input.forward} --metrics {input.metrics}"
        " --samples {params.samples} --out {params.folder} > {log} 2>&1"


rule report:
    """One self-contained HTML file: claims, tables, figures and sample grids."""
    input:
        first_shards,
        expand("results/{{experiment}}/figures/{figure}.png", figure=FIGURES),
        expand("models/{{experiment}}/classifiers/{role}/accuracy_over_t.csv", role=ROLES),
        "models/{experiment}/ddpm/training.csv",
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
        "logs/{experiment}/report.tsv"
    localrule: True
    conda:
        "../envs/nrcg.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=30,
    params:
        config=settings_file("report"),
        results=folder("results/{experiment}"),
        models=folder("models/{experiment}"),
    shell:
        "nrcg report --config {params.config} --forward {input.forward} --metrics {input.metrics}"
        " --samples {params.results}/samples --figures {params.results}/figures --models {params.models}"
        " --reference {input.reference} --comparison {output.comparison} --out {output.html} > {log} 2>&1"
