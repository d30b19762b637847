// Generated from llm_magic/wire.py by labextension/generate_types.py: change it there.

/** One block and what happens to it in every sweep; `label` is what a person reads and types. */
export interface BlockState {
  label: string
  kind: string
  bytes: number
  dtype: string
  home: string
  compute: string
  way: 'cpu' | 'idle' | 'kept' | 'looked-up' | 'read' | 'resident' | 'split' | 'streamed'
  cache_bytes: number
  tied_to: string[]
  experts: number
  active_experts: number
  prefill: string
  looks_up: boolean
  rest_bytes: number
}

/** One device with its bytes by purpose, and how much of it is drawn. */
export interface TierState {
  device: string
  kind: 'cpu' | 'disk' | 'gpu' | 'npu'
  name: string
  total: number
  free: number
  unified: boolean
  limit: number
  is_limited: boolean
  is_whole: boolean
  can_hold: boolean
  weights: number
  split: number
  kept: number
  draft: number
  slots: number
  kv_cache: number
  activations: number
  buffers: number
  reserve: number
  other: number
  planned: number
  spare: number
  now: Record<string, number>
}

/** Bytes that go from one device to another for every token, and how fast that way is (0: unknown). */
export interface MoveState {
  source: string
  target: string
  bytes: number
  bytes_per_s: number
}

/** The same placement to copy: Python, `%llm` commands, JSON, options of llama.cpp and of the backend. */
export interface ExportState {
  python: string
  command: string
  json: string
  llama_cpp: string
  backend: string
}

/** A placement with its bytes, forecast and verdict. Rates are tokens per second, 0 when unknown. */
export interface PlanState {
  name: string
  dtype: string
  quantization: string
  bytes: number
  parameters: number
  context_length: number
  policy: string
  fits: boolean
  mapped: boolean
  blocks: BlockState[]
  tiers: TierState[]
  moves: MoveState[]
  decode_tps: number
  prefill_tps: number
  limit_tps: number
  bound_by: string
  warnings: string[]
  problems: string[]
  remedies: string[]
  exports: ExportState
  long_sweep: number
}

/** The memory map and editor of one model; `model` is empty before it is loaded. */
export interface MapState {
  type: 'map'
  model: string
  status: 'loaded' | 'planned' | 'unloaded'
  plan: PlanState
  policies: string[]
  measured_tps: number
  tokens_per_sweep: number
  limit_share: number
}

/** One device of the machine picture; `assumed` names what nobody measured. */
export interface DeviceState {
  id: string
  kind: 'cpu' | 'disk' | 'gpu' | 'npu'
  name: string
  total: number
  free: number
  other: number
  read_bytes_per_s: number
  flops: number
  unified: boolean
  measured_on: string
  method: string
  assumed: string[]
}

/** One way between two devices. */
export interface LinkState {
  source: string
  target: string
  bytes_per_s: number
  name: string
  measured_on: string
  assumed: boolean
}

/** The machine, and the path of one token's bytes of the current model (`model` empty: none). */
export interface MachineState {
  type: 'machine'
  name: string
  described: boolean
  devices: DeviceState[]
  links: LinkState[]
  model: string
  moves: MoveState[]
}

/** A load, a move, a measurement at work; `plan` once it is known where blocks will go. */
export interface JobState {
  type: 'job'
  title: string
  plan: PlanState | null
}

/** An answer that is coming: which model, and what bounds its speed. */
export interface AnswerState {
  type: 'answer'
  model: string
  placement: Record<string, number>
  bound_by: string
  streams_text: boolean
}

/** A new state of a view. */
export interface StateEvent {
  type: 'state'
  view: string
  state: MapState | MachineState | JobState | AnswerState
}

/** The kernel heard a `hello` of this view while it was at work: Stop and Cancel will be heard too. */
export interface HelloEvent {
  type: 'hello'
  view: string
}

/** More of an answer. `text` is appended, or all there is when `whole`. */
export interface AnswerEvent {
  type: 'answer'
  view: string
  seq: number
  text: string
  whole: boolean
  phase: 'converting' | 'downloading' | 'generating' | 'importing' | 'loading' | 'measuring' | 'moving' | 'planning' | 'prefill' | 'quantizing' | 'reading' | 'warming up' | null
  done: number
  total: number
  unit: string
  tokens: number
  elapsed_s: number
  first_token_s: number
  generation_tps: number
  tokens_per_sweep: number
}

/** Where a job is. `left_s` is 0 when nobody can tell; `detail` may be the label of a block. */
export interface ProgressEvent {
  type: 'progress'
  view: string
  phase: 'converting' | 'downloading' | 'generating' | 'importing' | 'loading' | 'measuring' | 'moving' | 'planning' | 'prefill' | 'quantizing' | 'reading' | 'warming up' | null
  done: number
  total: number
  unit: string
  detail: string
  elapsed_s: number
  left_s: number
}

/** The newest sweep: for each block, in model order, seconds of waiting, copying and computing. */
export interface SweepEvent {
  type: 'sweep'
  view: string
  times: [number, number, number][]
}

/** How the last answer of a map's model went, and what the model holds now; fields as in the states. */
export interface MeasuredEvent {
  type: 'measured'
  view: string
  measured_tps: number
  tokens_per_sweep: number
  limit_share: number
  now: Record<string, Record<string, number>>
}

/** What a proposal would mean. `changed` counts blocks that would move; `moved_bytes` their bytes. */
export interface ProposalEvent {
  type: 'proposal'
  view: string
  seq: number
  plan: PlanState
  changed: number
  moved_bytes: number
}

/** A command could not be done; `next_step` says what to do. */
export interface FailedEvent {
  type: 'failed'
  view: string
  seq: number
  message: string
  next_step: string
}

/** The placement is in force; a new state has come before. `seconds` is how long the engine took. */
export interface AppliedEvent {
  type: 'applied'
  view: string
  seq: number
  changed: number
  seconds: number
}

/** The live view ends; what the notebook holds is shown again. */
export interface ClosedEvent {
  type: 'closed'
  view: string
}

/** A view is on a screen (an empty view: the front end is there); asks for its state. */
export interface Hello {
  type: 'hello'
  view?: string
}

/** End the answer or the job of this view softly. */
export interface Stop {
  type: 'stop'
  view: string
}

/** A target: homes of blocks by label (others stay), or a policy by name; limits by device, none else. */
export interface Placement {
  homes?: Record<string, string>
  policy?: string
  limits?: Record<string, number>
}

/** Ask what a placement would mean; nothing moves. */
export interface Propose {
  type: 'propose'
  view: string
  seq: number
  placement: Placement
}

/** Move what changed, or load the model that was planned. */
export interface Apply {
  type: 'apply'
  view: string
  seq: number
  placement: Placement
}

export type State = MapState | MachineState | JobState | AnswerState

export type Event = StateEvent | HelloEvent | AnswerEvent | ProgressEvent | SweepEvent | MeasuredEvent | ProposalEvent | FailedEvent | AppliedEvent | ClosedEvent

export type Command = Hello | Stop | Propose | Apply
