rule reference:
    """What every method is compared with: the training images' features, and how good the classifiers are."""
    input:
        dataset_files,
        classifier_files("judge", "robust", "non_robust"),
    output:
        "results/{experiment}/reference.json",
    log:
        "logs/{experiment}/reference.log",
    benchmark:
        "logs/{experiment}/reference.tsv"
    conda:
        "../envs/nrcg.yaml"
    threads: feature_threads
    resources:
        gpu=gpus,
        mem_mb=8000,
        runtime=240,
    params:
        config=settings_file("reference"),
        data=data_folder,
        classifiers=folder("models/{experiment}/classifiers"),
        features=features,
    shell:
        "nrcg reference --config {params.config} --data {params.data} --classifiers {params.classifiers}"
        " --threads {threads} --out {output} > {log} 2>&1"


rule evaluate:
    """Accuracies and distances of a method at each of its scales."""
    input:
        dataset_files,
        classifier_files("judge", "robust", "non_robust"),
        ddpm_files,
        shard_files,
        reference="results/{experiment}/reference.json",
    output:
        "results/{experiment}/metrics/{method}.csv",
    log:
        "logs/{experiment}/evaluate_{method}.log",
    benchmark:
        "logs/{experiment}/evaluate_{method}.tsv"
    conda:
        "../envs/nrcg.yaml"
    threads: feature_threads
    resources:
        gpu=gpus,
        mem_mb=memory(8000),
        runtime=minutes(240),
    params:
        config=settings_file("evaluate", "method"),
        data=data_folder,
        classifiers=folder("models/{experiment}/classifiers"),
        ddpm=folder("models/{experiment}/ddpm"),
        samples=folder("results/{experiment}/samples"),
        scales=scales,
        features=features,
    shell:
        "nrcg evaluate --config {params.config} --method {wildcards.method} --scales {params.scales}"
        " --samples {params.samples} --data {params.data} --classifiers {params.classifiers}"
        " --ddpm {params.ddpm} --reference {input.reference} --threads {threads} --out {output} > {log} 2>&1"


rule collect:
    """metrics.csv of all methods, and its best rows as summary.json."""
    input:
        metric_files,
    output:
        metrics="results/{experiment}/metrics.csv",
        summary="results/{experiment}/summary.json",
    log:
        "logs/{experiment}/collect.log",
    benchmark:
        "logs/{experiment}/collect.tsv"
    localrule: True  # less than a second, also on a cluster
    conda:
        "../envs/nrcg.yaml"
    threads: 1
    resources:
        mem_mb=500,
        runtime=10,
    params:
        best_by=best_by,
    shell:
        "nrcg collect --metrics {input} --best-by {params.best_by} --out {output.metrics}"
        " --summary {output.summary} > {log} 2>&1"
