/** Blocks by keyboard: arrows go, Shift extends, Space toggles, M asks where to, Alt with an arrow moves. */

import type { BlockList } from '../map/list'
import type { PlanState } from '../../wire'
import type { Editor } from './editor'

export interface KeyHooks {
  editor: Editor
  /** Show where the selection could go, and put the focus there. */
  askWhere: () => void
  /** Something was chosen, or given up. */
  chosen: () => void
}

/** Handle a key on a block. Returns whether it meant something. */
export function blockKey(event: KeyboardEvent, list: BlockList, label: string, hooks: KeyHooks): boolean {
  if (event.altKey) return moveKey(event, label, hooks)
  if (event.ctrlKey || event.metaKey) return allKey(event, list, hooks)
  const target = destination(event.key, list.labels, label)
  if (target !== null) {
    if (event.shiftKey) extend(list, label, target, hooks)
    list.focus(target)
    return true
  }
  return choiceKey(event, label, hooks)
}

/** Where a key goes from a block; null when it does not travel. */
function destination(key: string, labels: string[], label: string): string | null {
  const at = labels.indexOf(label)
  const last = labels.length - 1
  const index = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: last }[key]
  if (index === undefined) return null
  return labels[Math.max(0, Math.min(last, index))] ?? null
}

function extend(list: BlockList, from: string, to: string, { editor, chosen }: KeyHooks): void {
  if (!editor.canEdit) return
  if (!editor.selection.has(from)) editor.selection.only(from)
  editor.selection.extend(to, list.labels)
  chosen()
}

function choiceKey(event: KeyboardEvent, label: string, hooks: KeyHooks): boolean {
  const { editor } = hooks
  if (!editor.canEdit) return false
  switch (event.key) {
    case ' ':
      editor.selection.toggle(label)
      break
    case 'Escape':
      if (!editor.selection.labels.size) return false
      editor.selection.clear()
      break
    case 'm':
    case 'M':
    case 'Enter':
      choose(editor, label)
      hooks.chosen()
      hooks.askWhere()
      return true
    default:
      return false
  }
  hooks.chosen()
  return true
}

function allKey(event: KeyboardEvent, list: BlockList, { editor, chosen }: KeyHooks): boolean {
  if (event.key.toLowerCase() !== 'a' || !editor.canEdit) return false
  editor.selection.all(list.labels)
  chosen()
  return true
}

/** Alt with an arrow: to the tier above or below, as far as there is one that holds blocks. */
function moveKey(event: KeyboardEvent, label: string, { editor, chosen }: KeyHooks): boolean {
  const step = { ArrowUp: -1, ArrowDown: 1 }[event.key]
  if (step === undefined || !editor.canEdit) return false
  choose(editor, label)
  const target = neighbour(editor.plan, label, step)
  if (target === '' || !editor.move(editor.selection.labels, target)) chosen()
  return true
}

/** What is done is done to the focused block: it takes the place of a selection that it is not in. */
function choose({ selection }: Editor, label: string): void {
  if (!selection.has(label)) selection.only(label)
}

/** The next tier above or below a block's home that holds blocks; empty where there is none. */
function neighbour({ blocks, tiers }: PlanState, label: string, step: number): string {
  const home = blocks.find(block => block.label === label)?.home
  const at = tiers.findIndex(tier => tier.device === home)
  if (at < 0) return ''
  const beyond = step > 0 ? tiers.slice(at + 1) : tiers.slice(0, at).reverse()
  return beyond.find(tier => tier.can_hold)?.device ?? ''
}
