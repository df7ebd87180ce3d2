//! The bench runs to its end on our driver, whose figures mean nothing.

use std::process::Command;

#[test]
fn the_bench_runs_to_its_end_without_a_gpu() {
    let here = std::env::current_exe().unwrap();
    // `cargo test` builds the examples too, beside the folder of the tests.
    let bench = here.parent().unwrap().with_file_name("examples").join("gpu_bench");
    if !bench.exists() {
        eprintln!("skipped: {} was not built", bench.display());
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    // With all that a driver can have, without the batched copy, and without kernels.
    for version in ["13000", "12070", "11070"] {
        let figures = dir.path().join(version);
        let mut command = Command::new(&bench);
        command.env_remove("KVD_CUDA").env("FAKE_CUDA", format!("version={version}"));
        let ran = command.arg("--json").arg(&figures).output().unwrap();
        let said = String::from_utf8_lossy(&ran.stdout);
        assert!(ran.status.success(), "{said}{}", String::from_utf8_lossy(&ran.stderr));
        assert!(said.contains("the figures mean nothing"), "{said}");
        let figures: serde_json::Value = serde_json::from_slice(&std::fs::read(&figures).unwrap()).unwrap();
        assert_eq!(figures["about"]["meaningful"], false);
        for way in ["up", "down", "across"] {
            for row in figures[way].as_array().unwrap() {
                let there = |method: &str| row[method]["ratio"].is_number();
                assert_eq!(there("batch"), version == "13000", "{version} {row}");
                assert_eq!(there("kernel"), version != "11070", "{version} {row}");
                assert!(there("loop") && there("auto"), "{version} {row}");
            }
        }
        assert!(
            figures["overlap"]["together_ms"].is_number() && figures["other_process"]["ratio"].is_number()
        );
        assert_eq!(figures["checksums"].is_null(), version == "11070");
    }
}
