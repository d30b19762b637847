/**
 * The device-map editor without its elements: the placement that is asked for, what Python says of it, and
 * whether it is being carried out. Every change is a proposal; only `apply` moves bytes.
 */

import type {
  AppliedEvent, Command, Event, FailedEvent, MapState, MeasuredEvent, Placement, PlanState, ProgressEvent, ProposalEvent,
} from '../../wire'
import { guess, withTied } from './guess'
import { History } from './history'
import { Selection } from './selection'
import { Talk } from './talk'
import { isEditable, isSamePlacement } from '../map/facts'

/** A placement that is asked for; `plan` is a guess until there is an answer. */
export interface Step {
  placement: Required<Placement>
  plan: PlanState
  answer: ProposalEvent | null
  failure: FailedEvent | null
  gesture: string
}

/** What is to be drawn again: how far Apply is, how the last answer went, or everything. */
export type Change = 'progress' | 'figures' | 'all'

const AUTO = 'auto'

export class Editor {
  readonly selection = new Selection()
  progress: ProgressEvent | null = null
  applied: AppliedEvent | null = null
  /** Why the last Apply was not done. */
  failure: FailedEvent | null = null
  isApplying = false
  private isLost = false
  /** The Apply that was asked for here and has not ended: its number, and what it was about. */
  private own: { seq: number; step: Step | null } | null = null
  /** Placements that were in force before what was applied here, to go back to. */
  private formers: Step[] = []
  private history = new History<Step | null>(null)
  private readonly talk: Talk

  constructor(
    public state: MapState,
    private readonly view: string,
    private readonly send: (command: Command) => void,
    private readonly changed: (what: Change) => void,
  ) {
    this.talk = new Talk(view, send)
  }

  // --- What is shown

  get step(): Step | null {
    return this.history.current
  }

  /** The plan that the map draws: what is asked for, else what is in force. */
  get plan(): PlanState {
    return this.step?.plan ?? this.state.plan
  }

  get isWaiting(): boolean {
    return this.talk.isWaiting
  }

  get canEdit(): boolean {
    return !this.isLost && !this.isApplying && isEditable(this.state)
  }

  get canUndo(): boolean {
    return this.canEdit && this.history.canUndo
  }

  get canRedo(): boolean {
    return this.canEdit && this.history.canRedo
  }

  get canApply(): boolean {
    if (!this.canEdit || this.isWaiting) return false
    const isPlanned = this.state.status === 'planned'
    if (!this.step) return isPlanned && this.plan.fits
    const { answer, failure } = this.step
    return !failure && answer !== null && answer.plan.fits && (isPlanned || answer.changed > 0)
  }

  /** Budgets that the user set, here or before; others are what is free. */
  get limits(): Record<string, number> {
    if (this.step) return this.step.placement.limits
    return limitsOf(this.state.plan)
  }

  /** The policy that is chosen; empty when blocks were placed by hand. */
  get policy(): string {
    if (this.step) return this.step.placement.policy
    return this.state.policies.includes(this.plan.policy) ? this.plan.policy : ''
  }

  /** Whether what is drawn is known: Python has said what it means, or it is in force. */
  get isKnown(): boolean {
    return !this.step || this.step.answer !== null
  }

  /** The blocks that would go along with these, with themselves, when they move. */
  movers(labels: Iterable<string>): Set<string> {
    return withTied(this.plan, labels)
  }

  // --- What a person does

  /** Ask for these blocks on a device. Returns how many of them were elsewhere. */
  move(labels: Iterable<string>, device: string): number {
    const isTarget = this.plan.tiers.some(tier => tier.device === device && tier.can_hold)
    if (!this.canEdit || !isTarget) return 0
    const movers = this.movers(labels)
    const count = this.plan.blocks.filter(block => movers.has(block.label) && block.home !== device).length
    if (!count) return 0
    const plan = guess(this.plan, movers, device)
    this.ask({ homes: homesOf(plan), policy: '', limits: this.limits }, plan)
    return count
  }

  choosePolicy(policy: string): void {
    if (policy) this.ask({ homes: {}, policy, limits: this.limits })
  }

  /** A budget while its slider moves; `endGesture` when it rests. */
  setLimit(device: string, bytes: number): void {
    this.limit({ ...this.limits, [device]: bytes }, `limit ${device}`)
  }

  /** No budget: a device may be used as far as it is free. */
  clearLimit(device: string): void {
    this.limit(Object.fromEntries(Object.entries(this.limits).filter(([other]) => other !== device)))
  }

  endGesture(): void {
    this.history.endGesture()
  }

  /** Leave it to the planner, with the budgets that are in force. */
  reset(): void {
    this.ask({ homes: {}, policy: AUTO, limits: limitsOf(this.state.plan) })
  }

  /** Back to what is in force. */
  revert(): void {
    if (!this.canEdit || !this.step) return
    this.history.push(null)
    this.settle()
  }

  undo(): void {
    if (this.canUndo && this.history.undo()) this.settle()
  }

  redo(): void {
    if (this.canRedo && this.history.redo()) this.settle()
  }

  apply(): void {
    if (!this.canApply) return
    this.isApplying = true
    this.failure = this.applied = this.progress = null
    const { step } = this
    this.own = { seq: this.talk.apply(step?.placement ?? placementOf(this.plan)), step }
    this.changed('all')
  }

  stop(): void {
    if (!this.isLost) this.send({ type: 'stop', view: this.view })
  }

  // --- What Python says

  take(event: Event): void {
    if (this.isLost) return
    if (event.type === 'proposal') this.takeProposal(event)
    else if (event.type === 'failed') this.takeFailure(event)
    else if (event.type === 'progress') this.takeProgress(event)
    else if (event.type === 'measured') this.takeMeasured(event)
    else if (event.type === 'applied') this.takeApplied(event)
  }

  /**
   * Take a state. When another placement is in force than before, what was asked for is history; a state comes
   * for every front end that says hello as well, and changes nothing then. Returns whether it is another.
   */
  update(state: MapState): boolean {
    const before = this.state
    this.state = state
    const isOther = !isSamePlacement(before, state)
    if (isOther) this.startAnew(before)
    this.changed('all')
    return isOther
  }

  /** No commands any more. */
  lose(): void {
    this.isLost = true
    this.isApplying = false
    this.progress = null
    this.talk.drop()
    this.selection.clear()
    this.changed('all')
  }

  cleanup(): void {
    this.talk.drop()
  }

  private startAnew(before: MapState): void {
    const { state } = this
    const isOwn = this.own !== null && before.status === 'loaded' && state.status === 'loaded'
    this.formers = isOwn ? [...this.formers, stepTo(before.plan)] : []
    this.history = this.fresh()
    this.talk.drop()
    this.isApplying = false // if it goes on, its progress says so
    this.progress = this.failure = this.applied = null
    this.selection.keep(isEditable(state) ? state.plan.blocks.map(block => block.label) : [])
  }

  private fresh(): History<Step | null> {
    return new History<Step | null>(null, [...this.formers])
  }

  /** Other budgets for what is asked for: the same policy, or the same homes. */
  private limit(limits: Record<string, number>, gesture = ''): void {
    const { plan, policy } = this
    this.ask({ homes: policy ? {} : homesOf(plan), policy, limits }, plan, gesture)
  }

  private ask(placement: Required<Placement>, plan = this.plan, gesture = ''): void {
    if (!this.canEdit) return
    this.failure = this.applied = null
    this.history.push({ placement, plan, answer: null, failure: null, gesture }, gesture)
    this.talk.propose(placement)
    this.changed('all')
  }

  /** Another step of the history is the current one: ask anew, for memory may be another by now. */
  private settle(): void {
    this.failure = this.applied = null
    if (this.step) this.talk.propose(this.step.placement)
    else this.talk.forget()
    this.changed('all')
  }

  private takeProposal(event: ProposalEvent): void {
    const found = this.talk.take(event.seq)
    const { step } = this
    if (found === 'stale' || !step) return
    // While a slider moves, an answer to where it was a moment ago is better than none.
    if (found === 'past' && !step.gesture) return
    this.history.amend({ ...step, plan: event.plan, answer: event, failure: null })
    this.changed('all')
  }

  private takeFailure(event: FailedEvent): void {
    if (event.seq === this.own?.seq || this.isEndOfOther(event.seq)) {
      this.end()
      this.failure = event
    } else if (this.talk.take(event.seq) === 'newest' && this.step) {
      this.history.amend({ ...this.step, answer: null, failure: event })
    } else return
    this.changed('all')
  }

  private takeApplied(event: AppliedEvent): void {
    const { own } = this
    const isOwn = event.seq === own?.seq
    if (!isOwn && !this.isEndOfOther(event.seq)) return
    // It is in force now, and was before if no other state came.
    if (isOwn && own?.step && own.step === this.step) this.history = this.fresh()
    this.end()
    this.failure = null
    this.applied = event
    this.changed('all')
  }

  /** Something is applied, perhaps from another tab, or before this page was loaded again. */
  private takeProgress(event: ProgressEvent): void {
    const isNew = !this.isApplying
    this.isApplying = true
    this.progress = event
    if (isNew) this.applied = null
    this.changed(isNew ? 'all' : 'progress')
  }

  private takeMeasured({ measured_tps, tokens_per_sweep, limit_share, now }: MeasuredEvent): void {
    const { plan } = this.state
    const tiers = plan.tiers.map(tier => ({ ...tier, now: now[tier.device] ?? {} }))
    this.state = { ...this.state, measured_tps, tokens_per_sweep, limit_share, plan: { ...plan, tiers } }
    this.changed('figures')
  }

  /** Whether a number is of another front end, and ends the Apply that is shown and is not from here. */
  private isEndOfOther(seq: number): boolean {
    return this.isApplying && this.own === null && !this.talk.isOwn(seq)
  }

  private end(): void {
    this.own = this.progress = null
    this.isApplying = false
  }
}

function homesOf(plan: PlanState): Record<string, string> {
  return Object.fromEntries(plan.blocks.map(block => [block.label, block.home]))
}

/** Budgets that were set, by device. */
function limitsOf(plan: PlanState): Record<string, number> {
  return Object.fromEntries(plan.tiers.filter(tier => tier.is_limited).map(tier => [tier.device, tier.limit]))
}

function placementOf(plan: PlanState): Required<Placement> {
  return { homes: homesOf(plan), policy: '', limits: limitsOf(plan) }
}

/** A plan that was in force, as one to ask for. */
function stepTo(plan: PlanState): Step {
  return { placement: placementOf(plan), plan, answer: null, failure: null, gesture: '' }
}
