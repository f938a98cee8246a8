rule forward:
    """Accuracy, logit and gradient sensitivity along the forward process (figs. 1 to 4)."""
    input:
        arrays,
        ancient("models/{experiment}/ddpm/unet/diffusion_pytorch_model.safetensors"),
        ancient(
            expand(
                "models/{{experiment}}/classifiers/{role}/model.safetensors",
                role=("robust", "non_robust"),
            )
        ),
        "models/{experiment}/classifiers/non_robust/config.json",
        manifest=manifest,
        ddpm="models/{experiment}/ddpm/training.json",
        robust="models/{experiment}/classifiers/robust/config.json",
    output:
        "results/{experiment}/forward.csv",
    log:
        "logs/{experiment}/forward.log",
    benchmark:
        "benchmarks/{experiment}/forward.tsv"
    priority: 10  # the longest job of its stage: last, it would leave the other cores idle
    threads: 1
    resources:
        gpu=asked(lambda job: job.gpus),
        mem_mb=growing(lambda job, wildcards: job.guided_mb("forward")),
        runtime=growing(lambda job, wildcards: job.forward_minutes()),
    params:
        config=settings_file("forward"),
        data=subpath(input.manifest, parent=True),
        ddpm=subpath(input.ddpm, parent=True),
        classifiers=subpath(input.robust, ancestor=2),
    shell:
        "nrcg forward --config {params.config} --data {params.data} --ddpm {params.ddpm}"
        " --classifiers {params.classifiers} --threads {threads} --out {output} > {log} 2>&1"
