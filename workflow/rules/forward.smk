rule forward:
    """Accuracy, logit and gradient sensitivity along the forward process (figs. 1 to 4)."""
    input:
        dataset_files,
        ddpm_files,
        classifier_files("robust", "non_robust"),
    output:
        "results/{experiment}/forward.csv",
    log:
        "logs/{experiment}/forward.log",
    benchmark:
        "logs/{experiment}/forward.tsv"
    priority: 10  # the longest job of its stage: last, it would leave the other cores idle
    conda:
        "../envs/nrcg.yaml"
    threads: 1
    resources:
        gpu=gpus,
        mem_mb=guided_memory("forward"),
        runtime=forward_runtime,
    params:
        config=settings_file("forward"),
        data=data_folder,
        models=folder("models/{experiment}"),
    shell:
        "nrcg forward --config {params.config} --data {params.data} --ddpm {params.models}/ddpm"
        " --classifiers {params.models}/classifiers --threads {threads} --out {output} > {log} 2>&1"
