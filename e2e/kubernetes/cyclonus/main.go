// Command cyclonus runs cyclonus' generated network policies against a cluster: its test cases, its model, its probes,
// its comparison. Beside the original's `generate` it sends the probes of a pod in one batch (which the original can do
// but does not offer), asks the API server as often as it likes, chooses cases evenly, and writes a summary as JSON.
package main

import (
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/mattfenwick/cyclonus/pkg/connectivity"
	"github.com/mattfenwick/cyclonus/pkg/connectivity/probe"
	"github.com/mattfenwick/cyclonus/pkg/generator"
	"github.com/mattfenwick/cyclonus/pkg/kube"
	v1 "k8s.io/api/core/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"
)

var (
	kubeconfig = flag.String("kubeconfig", "", "kubeconfig `file` of an administrator")
	protocols  = flag.String("protocols", "TCP,UDP", "what pods serve and probes use")
	include    = flag.String("include", "", "only cases with one of these tags")
	exclude    = flag.String("exclude", "", "no cases with one of these tags")
	only       = flag.Int("case", 0, "only the case of this `number`")
	every      = flag.Int("every", 1, "only every `n`th of the chosen cases")
	mode       = flag.String("mode", "", "probe by service-name, service-ip or pod-ip; as the case says if empty")
	wait       = flag.Int("wait", 1, "`seconds` between a change and the probe")
	retries    = flag.Int("retries", 4, "how often a probe that differs is repeated")
	report     = flag.String("json", "", "write a summary to this `file`")
	list       = flag.Bool("list", false, "only say which cases there are")
)

// summary is what -json writes.
type summary struct {
	Cases   int            `json:"cases"`
	Passed  int            `json:"passed"`
	Failed  int            `json:"failed"`
	Steps   int            `json:"steps"`
	Retried int            `json:"retried"`
	Right   map[string]int `json:"right"`
	Wrong   map[string]int `json:"wrong"`
	Seconds float64        `json:"seconds"`
	// Names of the failed cases.
	Failures []string `json:"failures"`
}

var namespaces = []string{"x", "y", "z"}

func main() {
	flag.Parse()
	failed, err := run()
	if err != nil {
		fmt.Fprintf(os.Stderr, "cyclonus: %v\n", err)
	}
	if err != nil || failed {
		os.Exit(1)
	}
}

func run() (bool, error) {
	start := time.Now()
	if *list {
		for _, chosen := range choose("10.0.0.1") {
			fmt.Printf("%3d %s [%s]\n", chosen.number, chosen.Description, strings.Join(chosen.Tags.Keys(), " "))
		}
		return false, nil
	}
	cluster, err := connect()
	if err != nil {
		return false, err
	}
	resources, err := probe.NewDefaultResources(
		cluster, namespaces, []string{"a", "b", "c"}, []int{80, 81}, servers(), nil, 120, true, "registry.k8s.io")
	if err != nil {
		return false, err
	}
	last, err := resources.GetPod("z", "c")
	if err != nil {
		return false, err
	}
	interpreter := connectivity.NewInterpreter(cluster, resources, &connectivity.InterpreterConfig{
		ResetClusterBeforeTestCase:       true,
		KubeProbeRetries:                 *retries,
		PerturbationWaitSeconds:          *wait,
		VerifyClusterStateBeforeTestCase: true,
		BatchJobs:                        true,
		JobTimeoutSeconds:                1,
	})
	printer := &connectivity.Printer{}
	cases := choose(last.IP)
	sum := summary{Cases: len(cases), Failures: []string{}}
	for i, chosen := range cases {
		begun := time.Now()
		result := interpreter.ExecuteTestCase(chosen.TestCase)
		name := fmt.Sprintf("%d: %s", chosen.number, chosen.Description)
		if result.Err != nil {
			return false, fmt.Errorf("case %s: %w", name, result.Err)
		}
		passed := sum.add(result)
		verdict := "ok"
		if !passed {
			verdict = "FAILED"
			sum.Failures = append(sum.Failures, name)
			printer.PrintTestCaseResult(result)
		}
		fmt.Printf("case %d/%d %s ... %s (%.1f s)\n", i+1, len(cases), name, verdict, time.Since(begun).Seconds())
	}
	sum.Seconds = time.Since(start).Seconds()
	return sum.Failed > 0, sum.write()
}

// servers are the protocols that every pod serves.
func servers() []v1.Protocol {
	var all []v1.Protocol
	for _, name := range strings.Split(*protocols, ",") {
		all = append(all, v1.Protocol(name))
	}
	return all
}

// numbered is a case with its number among all that cyclonus has.
type numbered struct {
	*generator.TestCase
	number int
}

func choose(ip string) []numbered {
	tags := func(list string) []string {
		return strings.FieldsFunc(list, func(r rune) bool { return r == ',' })
	}
	all := generator.NewTestCaseGenerator(true, ip, namespaces, nil, nil).GenerateAllTestCases()
	var chosen []numbered
	matching := 0
	for i, one := range all {
		wanted := (*include == "" || one.Tags.ContainsAny(tags(*include))) && !one.Tags.ContainsAny(tags(*exclude))
		if !wanted || *only != 0 && *only != i+1 {
			continue
		}
		if matching%*every == 0 {
			chosen = append(chosen, numbered{one, i + 1})
		}
		matching++
		for _, step := range one.Steps {
			if *mode != "" {
				step.Probe.Mode = generator.ProbeMode(*mode)
			}
		}
	}
	return chosen
}

// connect is kube.NewKubernetesForContext without the limit of five requests a second.
func connect() (*kube.Kubernetes, error) {
	config, err := clientcmd.BuildConfigFromFlags("", *kubeconfig)
	if err != nil {
		return nil, err
	}
	config.QPS, config.Burst = 500, 500
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return nil, err
	}
	return &kube.Kubernetes{ClientSet: client, RestConfig: config}, nil
}

// add counts a case and says whether it passed.
func (s *summary) add(result *connectivity.Result) bool {
	if s.Right == nil {
		s.Right, s.Wrong = map[string]int{}, map[string]int{}
	}
	for _, step := range result.Steps {
		s.Steps++
		s.Retried += len(step.KubeProbes) - 1
		for protocol, counts := range step.LastComparison().ValueCountsByProtocol(false) {
			s.Right[string(protocol)] += counts[connectivity.SameComparison]
			s.Wrong[string(protocol)] += counts[connectivity.DifferentComparison]
		}
	}
	passed := result.Passed(false)
	if passed {
		s.Passed++
	} else {
		s.Failed++
	}
	return passed
}

func (s *summary) write() error {
	fmt.Printf("cyclonus: %d of %d cases passed, %d steps (%d repeated), %.0f s\n",
		s.Passed, s.Cases, s.Steps, s.Retried, s.Seconds)
	if *report == "" {
		return nil
	}
	text, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(*report, append(text, '\n'), 0o644)
}
