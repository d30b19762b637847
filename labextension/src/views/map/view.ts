/**
 * The memory map and its editor: every tier at one scale, every block in its tier, and all of them in model
 * order. Blocks that are moved are a proposal until Apply.
 */

import { h, replace, setText } from '../../dom'
import type { Shown, StateOf, Surroundings, View } from '../../view'
import type { Event, PlanState } from '../../wire'
import { type Budget, hasBudget, makeBudget } from '../editor/budget'
import { makeDrag } from '../editor/drag'
import { type Change, Editor } from '../editor/editor'
import { blockKey, type KeyHooks } from '../editor/keys'
import { dropHooks } from '../editor/drop'
import { makePanel } from '../editor/panel'
import { cellLines, type Scene } from './cells'
import { MAP_CSS } from './css'
import { isEditable } from './facts'
import { makeFlow } from './flow'
import { makeHead } from './head'
import { makeLegend } from './legend'
import type { BlockList } from './list'
import { Strip } from './strip'
import { Tiers, tierLines } from './tiers'
import { makeTip } from './tip'
import { timesWords } from './words'

type MapState = StateOf<'map'>

export const mapView: View<MapState> = (state, surroundings) => new MapScreen(state, surroundings)

class MapScreen implements Shown<MapState> {
  private readonly frame = h('div', { class: 'map' })
  private readonly banner = h('div', { class: 'lost', role: 'status', hidden: true })
  private readonly editor: Editor
  private readonly head
  private readonly tiers
  private readonly strip
  private readonly legend
  private readonly panel
  private readonly tip = makeTip(this.frame)
  private readonly drag
  private readonly flow = makeFlow(() => this.rest())
  private readonly budgets = new Map<string, Budget>()
  private readonly resizes: ResizeObserver | null
  private lostMessage = ''
  private width = 0
  private names = new Map<string, string>()
  private named: PlanState | null = null
  /** The block that had the focus last, and its list: where Move to puts the focus back. */
  private place: { list: BlockList; label: string } | null = null

  constructor(state: MapState, private readonly surroundings: Surroundings) {
    const { t, view, send, root } = surroundings
    this.editor = new Editor(state, view, send, what => this.changed(what))
    this.head = makeHead(t)
    this.tiers = new Tiers(t)
    this.strip = new Strip(t)
    this.legend = makeLegend(t)
    this.panel = makePanel(t, this.editor, () => this.targets(), () => this.focusBlock())
    this.drag = makeDrag(this.frame, dropHooks(t, this.editor, this.tiers, () => {
      this.tip.hide()
      this.chosen()
    }))
    replace(
      this.frame, this.banner, this.head.element, this.tiers.element, this.strip.element, this.legend.element,
      this.panel.element, this.tip.element, this.drag.ghost,
    )
    replace(root, h('style', {}, MAP_CSS), this.frame)
    this.listen()
    this.redraw()
    this.resizes = this.watchWidth()
  }

  update(state: MapState): void {
    if (!this.editor.update(state)) return
    this.drag.cancel()
    this.tip.hide()
    if (state.status === 'unloaded') this.rest()
  }

  event(event: Event): void {
    if (this.lostMessage) return
    if (event.type === 'sweep') this.sweep(event.times)
    else this.editor.take(event)
    this.frame.classList.toggle('is-flowing', this.flow.isOn)
  }

  lost(message: string): void {
    this.lostMessage = message
    this.drag.cancel()
    this.tip.hide()
    this.rest()
    this.editor.lose()
  }

  cleanup(): void {
    this.drag.cancel()
    this.flow.cleanup()
    this.editor.cleanup()
    this.panel.cleanup()
    this.resizes?.disconnect()
    replace(this.surroundings.root)
  }

  // --- Drawing

  private get scene(): Scene {
    const { plan, state, selection, canEdit } = this.editor
    if (this.named !== plan) this.names = new Map()
    this.named = plan
    return { plan, base: state.plan, selected: selection.labels, canEdit, names: this.names }
  }

  private changed(what: Change): void {
    if (what === 'progress') this.panel.show()
    else if (what === 'figures') this.showFigures()
    else this.redraw()
  }

  private redraw(): void {
    const focused = this.focused()
    const { state, canEdit } = this.editor
    if (!canEdit) this.drag.cancel()
    this.head.show(this.editor)
    this.showBlocks()
    this.showLegend()
    this.showBudgets()
    this.panel.element.hidden = !isEditable(state) && !this.lostMessage
    this.panel.show()
    this.showBanner()
    this.refocus(focused)
  }

  /** How the last answer went, and what the model holds since. */
  private showFigures(): void {
    this.head.show(this.editor)
    this.tiers.showNow(this.scene)
  }

  /** All cells, at the width there is. */
  private showBlocks(): void {
    const { scene } = this
    this.tiers.show(scene, isEditable(this.editor.state))
    this.strip.show(scene)
    this.frame.classList.toggle('can-edit', scene.canEdit)
  }

  private showBudgets(): void {
    const { editor, surroundings } = this
    for (const row of this.tiers.rows) {
      const tier = editor.plan.tiers.find(other => other.device === row.device)
      if (!tier || !hasBudget(tier) || !isEditable(editor.state)) {
        replace(row.slot)
        continue
      }
      const budget = this.budgets.get(row.device) ?? makeBudget(surroundings.t, row.device, editor)
      this.budgets.set(row.device, budget)
      if (budget.element.parentElement !== row.slot) replace(row.slot, budget.element)
      budget.show(editor.plan, tier)
    }
  }

  private showLegend(): void {
    const { plan, state, step } = this.editor
    this.legend.show(plan, isEditable(state), this.flow.isLive, step !== null)
  }

  private showBanner(): void {
    const isUnloaded = this.editor.state.status === 'unloaded'
    const message = this.lostMessage || (isUnloaded ? this.surroundings.t('mapUnloaded') : '')
    this.banner.hidden = !message
    setText(this.banner, message)
    this.frame.classList.toggle('is-lost', message !== '')
  }

  private sweep(times: [number, number, number][]): void {
    const wasLive = this.flow.isLive
    const seconds = times.reduce((sum, time) => sum + time[0] + time[1] + time[2], 0)
    this.flow.sweep(seconds)
    this.strip.live(times)
    if (!wasLive) this.showLegend()
  }

  /** Nothing is generated any more. Times stay to be looked at, unless the model is gone. */
  private rest(): void {
    this.frame.classList.remove('is-flowing')
    if (!this.lostMessage && this.editor.state.status !== 'unloaded') return
    this.flow.clear()
    this.strip.clear()
    this.showLegend()
  }

  private watchWidth(): ResizeObserver | null {
    if (typeof ResizeObserver === 'undefined') return null // jsdom
    const observer = new ResizeObserver(() => {
      const { clientWidth } = this.frame
      if (clientWidth === this.width) return
      this.width = clientWidth
      this.tiers.measure()
      this.showBlocks()
    })
    observer.observe(this.frame)
    return observer
  }

  // --- Pointing, choosing, moving

  private listen(): void {
    const { frame } = this
    frame.addEventListener('pointerover', event => this.explain(event.target))
    frame.addEventListener('pointerleave', () => this.tip.hide())
    frame.addEventListener('focusin', event => this.focusedIn(event.target))
    frame.addEventListener('focusout', () => this.tip.hide())
    frame.addEventListener('click', event => this.click(event))
    frame.addEventListener('keydown', event => {
      if (!this.key(event)) return
      // The notebook must not take it for one of its own.
      event.preventDefault()
      event.stopPropagation()
    })
  }

  /** Devices that blocks may be moved to, fastest first. */
  private targets(): string[] {
    return this.editor.plan.tiers.filter(tier => tier.can_hold).map(tier => tier.device)
  }

  private click(event: MouseEvent): void {
    const found = this.blockAt(event.target)
    if (this.drag.swallowsClick() || !found || !this.editor.canEdit) return
    const { selection } = this.editor
    const { list, label } = found
    if (event.shiftKey) selection.extend(label, list.labels)
    else if (event.ctrlKey || event.metaKey) selection.toggle(label)
    else if (selection.has(label) && selection.labels.size === 1) selection.clear()
    else selection.only(label)
    list.focus(label)
    this.chosen()
  }

  private key(event: KeyboardEvent): boolean {
    const { editor } = this
    if (event.key === 'Escape' && this.tip.isShown) return this.tip.hide(), true
    const isText = event.target instanceof HTMLTextAreaElement
    if ((event.ctrlKey || event.metaKey) && !isText) {
      const key = event.key.toLowerCase()
      if (key === 'z') return event.shiftKey ? (editor.redo(), true) : (editor.undo(), true)
      if (key === 'y') return editor.redo(), true
    }
    const found = this.blockAt(event.target)
    return found !== null && blockKey(event, found.list, found.label, this.keyHooks)
  }

  private get keyHooks(): KeyHooks {
    return {
      editor: this.editor,
      askWhere: () => this.panel.askWhere(),
      chosen: () => this.chosen(),
    }
  }

  /** Another selection: cells and the row of targets are drawn anew, nothing else. */
  private chosen(): void {
    this.showBlocks()
    this.panel.show()
  }

  // --- Focus and tooltips

  private blockAt(target: EventTarget | null): { list: BlockList; label: string; cell: Element } | null {
    const cell = target instanceof Element ? target.closest('[role="option"]') : null
    const label = cell?.getAttribute('data-label')
    const list = [this.strip.list, ...this.tiers.lists].find(one => cell && one.element.contains(cell))
    return cell && list && label !== null && label !== undefined ? { list, label, cell } : null
  }

  private explain(target: EventTarget | null): void {
    if (this.frame.classList.contains('is-dragging')) return
    const lines = target instanceof Element ? this.linesOf(target) : null
    if (lines) this.tip.show(lines.over, lines.lines)
    else this.tip.hide()
  }

  /** What there is to say of an element, and what it stands over. */
  private linesOf(target: Element): { over: Element; lines: string[] } | null {
    const { t } = this.surroundings
    const { plan } = this.editor
    const found = this.blockAt(target)
    const block = found && plan.blocks.find(one => one.label === found.label)
    if (block) {
      const times = this.strip.timesOf(block.label)
      const lines = cellLines(t, this.scene, block)
      return { over: found.cell, lines: times ? [...lines, timesWords(t, times)] : lines }
    }
    const part = target.closest('[data-tip]')
    if (part) return { over: part, lines: [part.getAttribute('data-tip') ?? ''] }
    const place = target.closest('.name, .counts, .parts')
    const device = place?.closest('[data-device]')?.getAttribute('data-device')
    const tier = plan.tiers.find(one => one.device === device)
    return place && tier ? { over: place, lines: tierLines(t, this.scene, tier) } : null
  }

  private focusedIn(target: EventTarget | null): void {
    const found = this.blockAt(target)
    if (found) {
      found.list.rove(found.label)
      this.place = found
    }
    if (target instanceof Element && isFocusVisible(target)) this.explain(target)
  }

  /** The focus on the block that had it last, in whatever list it is now. */
  private focusBlock(): void {
    if (!this.place) return
    const { label, list } = this.place
    const isThere = (one: BlockList) => one.element.isConnected && one.cell(label) !== undefined
    const now = isThere(list) ? list : this.tiers.lists.find(isThere)
    now?.focus(label)
  }

  private focused(): Element | null {
    const active = (this.frame.getRootNode() as Document | ShadowRoot).activeElement
    return active && this.frame.contains(active) ? active : null
  }

  /** After cells went to other places, and buttons were disabled: the focus stays in the view. */
  private refocus(before: Element | null): void {
    if (!before || (this.focused() === before && !isDisabled(before))) return
    if (before.getAttribute('role') === 'option') this.focusBlock()
    else if (isDisabled(before)) this.panel.element.focus({ preventScroll: true })
  }
}

function isDisabled(element: Element): boolean {
  return element.matches(':disabled')
}

/** Whether the focus came by keyboard; where nobody can tell, it did. */
function isFocusVisible(element: Element): boolean {
  try {
    return element.matches(':focus-visible')
  } catch {
    return true
  }
}
