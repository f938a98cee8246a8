rule reference:
    """What every method is compared with: the training images' features, and how good the classifiers are."""
    input:
        arrays,
        ancient(expand("models/{{experiment}}/classifiers/{role}/model.safetensors", role=ROLES)),
        expand("models/{{experiment}}/classifiers/{role}/config.json", role=("robust", "non_robust")),
        manifest=manifest,
        judge="models/{experiment}/classifiers/judge/config.json",
    output:
        "results/{experiment}/reference.json",
    log:
        "logs/{experiment}/reference.log",
    benchmark:
        "benchmarks/{experiment}/reference.tsv"
    threads: asked(lambda job: job.feature_threads)
    resources:
        gpu=asked(lambda job: job.gpus),
        mem_mb=8000,
        runtime=240,
    params:
        config=settings_file("reference"),
        data=subpath(input.manifest, parent=True),
        classifiers=subpath(input.judge, ancestor=2),
        features=protocols,
    shell:
        "nrcg reference --config {params.config} --data {params.data} --classifiers {params.classifiers}"
        " --threads {threads} --out {output} > {log} 2>&1"


rule evaluate:
    """Accuracies and distances of a method at each of its scales."""
    input:
        arrays,
        files(lambda one, wildcards: one.shards_and_records(wildcards.method)),
        ancient("models/{experiment}/ddpm/unet/diffusion_pytorch_model.safetensors"),
        ancient(expand("models/{{experiment}}/classifiers/{role}/model.safetensors", role=ROLES)),
        expand("models/{{experiment}}/classifiers/{role}/config.json", role=("robust", "non_robust")),
        manifest=manifest,
        ddpm="models/{experiment}/ddpm/training.json",
        judge="models/{experiment}/classifiers/judge/config.json",
        reference="results/{experiment}/reference.json",
    output:
        "results/{experiment}/metrics/{method}.csv",
    log:
        "logs/{experiment}/evaluate_{method}.log",
    benchmark:
        "benchmarks/{experiment}/evaluate_{method}.tsv"
    threads: asked(lambda job: job.feature_threads)
    resources:
        gpu=asked(lambda job: job.gpus),
        mem_mb=memory(8000),
        runtime=lambda wildcards, attempt: attempt * 240,
    params:
        config=settings_file("evaluate", "method"),
        data=subpath(input.manifest, parent=True),
        classifiers=subpath(input.judge, ancestor=2),
        ddpm=subpath(input.ddpm, parent=True),
        results=subpath(input.reference, parent=True),
        scales=files(lambda one, wildcards: one.scale_texts(wildcards.method)),
        features=protocols,
    shell:
        "nrcg evaluate --config {params.config} --method {wildcards.method} --scales {params.scales}"
        " --samples {params.results}/samples --data {params.data} --classifiers {params.classifiers}"
        " --ddpm {params.ddpm} --reference {input.reference} --threads {threads} --out {output} > {log} 2>&1"


rule collect:
    """metrics.csv of all methods, and its best rows as summary.json."""
    input:
        files(lambda one, wildcards: one.method_metrics()),
    output:
        metrics="results/{experiment}/metrics.csv",
        summary="results/{experiment}/summary.json",
    log:
        "logs/{experiment}/collect.log",
    benchmark:
        "benchmarks/{experiment}/collect.tsv"
    localrule: True  # less than a second, also on a cluster
    threads: 1
    resources:
        mem_mb=500,
        runtime=10,
    params:
        best_by=setting(lambda settings: settings.evaluation.best_by),
    shell:
        "nrcg collect --metrics {input} --best-by {params.best_by} --out {output.metrics}"
        " --summary {output.summary} > {log} 2>&1"
